"""`timm-hne run` and `--device-modules timm_hne.training`.

timm's scripts are not part of its package. What they do that matters here (the names they import, the two parsers, the
order of steps) is done by small scripts of our own. The real ones come from timm's repository, or from the folder that
the environment variable TIMM_SCRIPTS names.
"""
import argparse
import os
import runpy
import subprocess
import sys
import threading
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import timm.task
import torch
import yaml
from PIL import Image

import timm_hne.training
from timm_hne.__main__ import main
from timm_hne.files import write_file
from timm_hne.training import launcher
from timm_hne.training.checkpoint import load_checkpoint

# Two parsers, the first for --config; the task bound at import; the arguments saved before anything is created.
TRAIN = '''
import argparse
import importlib

import timm
import torch
import yaml
from timm.task import ClassificationTask, LogitDistillationTask

config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser(description='Stand-in of train.py')
parser.add_argument('--model', default='resnet10t')
parser.add_argument('--epochs', type=int, default=1)
parser.add_argument('--output', default='result.yaml')
parser.add_argument('--torchscript', action='store_true')
parser.add_argument('--distil', action='store_true')
parser.add_argument('--teacher', default='resnet10t')
parser.add_argument('--device-modules', nargs='+')


def main():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        with open(args_config.config) as file:
            config = yaml.safe_load(file)
        unknown = set(config) - {action.dest for action in parser._actions}  # as timm 1.0.31 looks for them
        parser.set_defaults(**config)
    args = parser.parse_args(remaining)
    saved = dict(vars(args))
    if args_config.config:
        saved['unknown'] = sorted(unknown)
    for module in args.device_modules or ():
        importlib.import_module(module)

    kwargs = dict(width=4, nodes=(1, 1, 1, 2, 4)) if args.model.startswith('hne_') else {}
    model = timm.create_model(args.model, num_classes=3, **kwargs)
    if args.torchscript:
        model = torch.jit.script(model)
    if args.distil:
        task = LogitDistillationTask(student_model=model, teacher_model=timm.create_model(args.teacher, num_classes=3))
    else:
        task = ClassificationTask(
            model=model, criterion=torch.nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False)
    result = task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    result['loss'].backward()
    saved['task'] = type(task).__name__
    saved['terms'] = sorted(result)
    with open(args.output, 'w') as file:
        yaml.safe_dump(saved, file)


if __name__ == '__main__':
    main()
'''
OLD_TRAIN = '''
import argparse

parser = argparse.ArgumentParser()
parser.add_argument('--model', default='resnet10t')
parser.add_argument('--epochs', type=int, default=1)
parser.add_argument('--device-modules', nargs='+')
args = parser.parse_args()
for module in args.device_modules or ():
    __import__(module)
print('trained', args.model)
'''
VALIDATE = '''
import argparse

import timm
import torch
from timm.utils import ParseKwargs

parser = argparse.ArgumentParser()
parser.add_argument('--model', default='resnet10t')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
args = parser.parse_args()
model = timm.create_model(args.model, **args.model_kwargs)
print('members', model.num_members, tuple(model(torch.randn(1, 3, 8, 8)).shape))
'''
HNE, OTHER = 'hne_resnet50_c8', 'resnet10t'


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / 'script.py'
        path.write_text(text)
        return str(path)
    return write


@pytest.fixture
def train(tmp_path, script, monkeypatch):
    """Run the stand-in of train.py in this process and return what it saved."""
    path, output = script(TRAIN), tmp_path / 'result.yaml'
    monkeypatch.setattr(sys, 'argv', ['timm-hne'])

    def run(*arguments):
        main(['run', path, '--output', str(output), *arguments])
        return yaml.safe_load(output.read_text())
    return run


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240)


def test_ensembles_get_our_task(train):
    result = train('--model', HNE)
    assert result['task'] == 'HNETask'
    assert result['terms'] == ['hierarchical_codistillation', 'independent', 'loss', 'output']
    saved = {name: value for name, value in result.items() if name.startswith('hne_')}
    assert saved == {'hne_objective': 'hierarchical_codistillation', 'hne_alpha': 0.5, 'hne_temperature': 2.0}


def test_options_reach_the_task_and_are_saved(train, monkeypatch):
    seen = []
    monkeypatch.setattr(timm_hne.training.launcher, 'HNETask', lambda *args, **kwargs: seen.append(kwargs) or original(
        *args, **kwargs))
    original = timm_hne.training.HNETask
    result = train('--model', HNE, '--hne-objective', 'codistillation', '--hne-alpha', '0.25')
    assert result['terms'] == ['codistillation', 'independent', 'loss', 'output']
    assert (result['hne_objective'], result['hne_alpha'], result['hne_temperature']) == ('codistillation', 0.25, 2.0)
    assert (seen[0]['objective'], seen[0]['alpha']) == ('codistillation', 0.25)
    assert 'temperature' not in seen[0]


def test_other_models_are_untouched(train):
    result = train('--model', OTHER)
    assert result['task'] == 'ClassificationTask'
    assert result['terms'] == ['loss', 'output']


def test_timm_and_argparse_are_as_before(train):
    before = timm.task.ClassificationTask, argparse.ArgumentParser.parse_known_args
    train('--model', HNE)
    with pytest.raises(SystemExit):
        train('--no-such-argument')
    assert (timm.task.ClassificationTask, argparse.ArgumentParser.parse_known_args) == before
    assert before[0].__module__ == 'timm.task.classification'


def test_help(train, capsys):
    with pytest.raises(SystemExit) as exit:
        train('--help')
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert 'Stand-in of train.py' in text
    for option in ('--hne-objective', '--hne-alpha', '--hne-temperature', 'default: hierarchical_codistillation'):
        assert option in ' '.join(text.split())


def test_config_file(train, tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('hne_objective: hierarchical\nhne_alpha: 0.75\nother: 1\n')
    result = train('--config', str(config), '--model', HNE, '--hne-alpha', '0.25')
    assert result['terms'] == ['hierarchical', 'loss', 'output']
    assert result['hne_alpha'] == 0.25
    assert result['unknown'] == ['other']


@pytest.mark.parametrize('arguments, message', [
    (['--hne-objective', 'distil'], 'invalid choice'),
    (['--hne-alpha', '1.5'], 'got 1.5'),
    (['--hne-alpha', 'half'], 'invalid float value'),
    (['--hne-temperature', '0'], 'temperature'),
])
def test_wrong_options(train, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        train('--model', HNE, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(('line', 'message'), [
    ('hne_objective: distil', 'objective'),
    ('hne_alpha: true', 'alpha'),
    ('hne_alpha: [1]', 'alpha'),
    ('hne_temperature: cold', 'invalid float value'),
])
def test_wrong_option_in_config_file(train, tmp_path, capsys, line, message):
    config = tmp_path / 'config.yaml'
    config.write_text(f'{line}\n')
    with pytest.raises(SystemExit):
        train('--config', str(config), '--model', HNE)
    assert message in capsys.readouterr().err


def test_options_for_another_model(train):
    with pytest.raises(SystemExit, match=r'--hne-objective, --hne-alpha .*ResNet'):
        train('--model', OTHER, '--hne-alpha', '0.5', '--hne-objective', 'independent')


@pytest.mark.filterwarnings('ignore:.*torch.jit.script')
def test_scripted_ensemble(train):
    with pytest.raises(SystemExit, match='--torchcompile'):
        train('--model', HNE, '--torchscript')
    stages = timm.create_model('hne_from_timm', base='test_resnet', nodes=(1, 1, 1, 1, 2))
    with pytest.raises(SystemExit, match='--torchcompile'):
        launcher._create_task(timm.task.ClassificationTask, {}, model=torch.jit.script(stages))


def test_options_are_recorded_where_they_hold():
    for others, recorded in ((dict(), True), (dict(kd_model_name='resnet50'), False), (dict(task='multilabel'), False)):
        args = argparse.Namespace(model=HNE, **others)
        assert launcher._read_options(args) == {}
        assert hasattr(args, 'hne_objective') == recorded


def test_another_task(train):
    """Distilling an ensemble from a teacher warns; options that this would ignore are an error."""
    with pytest.warns(timm_hne.training.StockTaskWarning, match=r'LogitDistillationTask.*HNEResNet') as caught:
        assert train('--model', HNE, '--distil')['task'] == 'LogitDistillationTask'
    warning, = (warning for warning in caught if warning.category is timm_hne.training.StockTaskWarning)
    assert Path(warning.filename).name == 'script.py'
    with pytest.raises(SystemExit, match=r'--hne-objective .*LogitDistillationTask'):
        train('--model', HNE, '--distil', '--hne-objective', 'independent')


def test_distilling_from_an_ensemble_is_no_mistake(train):
    with warnings.catch_warnings():
        warnings.simplefilter('error', timm_hne.training.StockTaskWarning)
        assert train('--model', OTHER, '--distil', '--teacher', HNE)['task'] == 'LogitDistillationTask'


@pytest.mark.parametrize('arguments', [['--model', HNE], ['--hne-alpha', '0.5']])
def test_script_without_tasks(script, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(['run', script(OLD_TRAIN), *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert 'timm 1.0.23 or later' in error and f'v{timm.__version__}/train.py' in error
    main(['run', script(OLD_TRAIN), '--model', OTHER])
    assert capsys.readouterr().out == f'trained {OTHER}\n'


def test_script_of_another_version(script):
    with pytest.raises(SystemExit, match=rf'{timm.__version__} .*no_such_name'):
        main(['run', script('from timm.utils import no_such_name\n')])


def test_errors_of_the_script_keep_their_traceback(script, capsys):
    path = script('def fail():\n    raise ValueError("from the script")\n\n\nfail()\n')
    with pytest.raises(SystemExit) as exit:
        main(['run', path])
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert f'File "{path}", line 2, in fail' in error and 'ValueError: from the script' in error
    with pytest.raises(SystemExit) as exit:
        main(['run', script('import no_such_package\n')])
    assert exit.value.code == 1
    assert "No module named 'no_such_package'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(['run', script('raise SystemExit(7)\n')])
    assert exit.value.code == 7


def test_modules_beside_the_script(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    (tmp_path / 'helper_of_the_script.py').write_text('word = "helped"')
    monkeypatch.delitem(sys.modules, 'colorsys', raising=False)  # stands for timm, beside whose scripts there is a timm
    (tmp_path / 'colorsys.py').write_text('raise RuntimeError("not the installed one")')
    main(['run', script('import colorsys, helper_of_the_script\nprint(helper_of_the_script.word)\n')])
    assert capsys.readouterr().out == 'helped\n'


def test_missing_script(capsys, tmp_path):
    for path in (tmp_path / 'train.py', tmp_path):
        with pytest.raises(SystemExit) as exit:
            main(['run', str(path)])
        assert exit.value.code == 2
        assert f"no such file: '{path}'" in capsys.readouterr().err


def test_other_scripts_run_as_they_are(script, capsys):
    main(['run', script(VALIDATE), '--model', HNE, '--model-kwargs', 'num_members=4'])
    assert capsys.readouterr().out == 'members 4 (1, 10)\n'
    with pytest.raises(SystemExit):
        main(['run', script(VALIDATE), '--hne-alpha', '0.5'])
    assert 'unrecognized arguments: --hne-alpha' in capsys.readouterr().err


COUNT = '''
import logging

import timm
import torch
from fvcore.nn import FlopCountAnalysis

logging.basicConfig(level=logging.WARNING)
model = timm.create_model('hne_resnet50_c8', num_members=1).eval()
print('MACs', FlopCountAnalysis(model, torch.ones(1, 3, 32, 32)).by_operator()['conv'])
logging.getLogger('fvcore.nn.jit_analysis').warning('something else')
'''


def test_counting_warns_of_no_modules(script, monkeypatch, capsys, caplog):
    """As benchmark.py counts."""
    monkeypatch.setattr(sys, 'argv', ['timm-hne'])
    main(['run', script(COUNT)])
    assert 'never called' not in caplog.text and 'something else' in caplog.text
    assert capsys.readouterr().out == f'MACs {13_077_760 - 10 * 128}\n'


def test_command_line(script, tmp_path):
    output = tmp_path / 'result.yaml'
    done = python('-m', 'timm_hne', 'run', script(TRAIN), '--model', HNE, '--output', str(output))
    assert done.returncode == 0, done.stderr
    assert 'StockTaskWarning' not in done.stderr
    assert yaml.safe_load(output.read_text())['task'] == 'HNETask'


@pytest.fixture
def run_plainly(script, monkeypatch):
    """Run a script in this process as `python SCRIPT` would, with `timm_hne.training` not imported yet."""
    def run(text, *arguments):
        path = script(text)
        monkeypatch.setattr(sys, 'argv', [path, *arguments])
        monkeypatch.delitem(sys.modules, 'timm_hne.training')
        runpy.run_path(path, run_name='__main__')
    return run


@pytest.fixture
def train_by_module(tmp_path, run_plainly):
    """Run the stand-in with `--device-modules timm_hne.training` and a configuration."""
    output, config = tmp_path / 'result.yaml', tmp_path / 'config.yaml'

    def run(text, *arguments):
        config.write_text(text)
        run_plainly(TRAIN, '--config', str(config), '--output', str(output), '--device-modules', 'timm_hne.training',
                    *arguments)
        return yaml.safe_load(output.read_text())
    return run


def test_device_modules(script, tmp_path):
    output, config = tmp_path / 'result.yaml', tmp_path / 'config.yaml'
    config.write_text('hne_objective: independent\n')
    arguments = [script(TRAIN), '--device-modules', 'timm_hne.training', '--output', str(output)]
    done = python(*arguments, '--config', str(config), '--model', HNE)
    assert done.returncode == 0, done.stderr
    assert 'StockTaskWarning' not in done.stderr
    result = yaml.safe_load(output.read_text())
    assert (result['task'], result['terms']) == ('HNETask', ['independent', 'loss', 'output'])


def test_device_modules_with_another_model(train_by_module):
    assert train_by_module('epochs: 1\n', '--model', OTHER)['task'] == 'ClassificationTask'


def test_device_modules_with_options(train_by_module):
    assert train_by_module('hne_alpha: 5e-1\n', '--model', HNE)['task'] == 'HNETask'  # a string to YAML
    with pytest.raises(SystemExit, match=r'error: alpha .* True'):
        train_by_module('hne_alpha: true\n', '--model', HNE)


def test_device_modules_with_another_task(train_by_module):
    with pytest.warns(timm_hne.training.StockTaskWarning, match='LogitDistillationTask'):
        assert train_by_module('epochs: 1\n', '--model', HNE, '--distil')['task'] == 'LogitDistillationTask'


def test_device_modules_of_a_script_without_tasks(run_plainly):
    with pytest.raises(SystemExit, match=r'error: .*timm 1\.0\.23'):
        run_plainly(OLD_TRAIN, '--model', HNE, '--device-modules', 'timm_hne.training')


def test_plain_import_injects_nothing(run_plainly, tmp_path):
    """A script that imports the module itself keeps timm's task."""
    output = tmp_path / 'result.yaml'
    run_plainly(
        TRAIN.replace('import yaml\n', 'import yaml\nimport timm_hne.training\n', 1), '--model', HNE, '--output',
        str(output))
    assert yaml.safe_load(output.read_text())['task'] == 'ClassificationTask'


def image_folder(root):
    generator = torch.Generator().manual_seed(0)
    for split in ('train', 'validation'):
        for label in range(2):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = torch.randint(96, (16, 16, 3), generator=generator, dtype=torch.uint8) + 128 * label
                Image.fromarray(pixels.numpy()).save(folder / f'{index}.png')
    return root


def test_threads_do_not_mix_what_they_write_to_one_file(tmp_path):
    path, together = tmp_path / 'file', threading.Barrier(8)

    def write(letter):
        def save(temporary):
            together.wait(60)
            temporary.write_text(letter * 100)
            together.wait(60)

        write_file(path, save)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, 'abcdefgh'))
    assert path.read_text() in {letter * 100 for letter in 'abcdefgh'}
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        write_file(pipe, lambda path: path.write_text('text'))
        assert os.read(reader, 100) == b'text' and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    finally:
        os.close(reader)


@pytest.fixture
def timm_scripts(request, monkeypatch):
    """Folder with the train.py and validate.py of the installed timm, downloaded once: no distribution has them."""
    monkeypatch.setattr(sys, 'argv', ['timm-hne'])
    if 'TIMM_SCRIPTS' in os.environ:
        return Path(os.environ['TIMM_SCRIPTS'])
    folder = request.config.cache.mkdir(f'timm-{timm.__version__}')
    for name in ('train.py', 'validate.py'):
        url = f'https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{timm.__version__}/{name}'
        try:
            if not (folder / name).exists():
                with urllib.request.urlopen(url, timeout=10) as response:
                    data = response.read()
                write_file(folder / name, lambda path, data=data: path.write_bytes(data))
        except OSError as error:
            pytest.skip(f'TIMM_SCRIPTS names no folder with {name}, and {url} cannot be read: {error}')
    return folder


def test_timms_own_scripts(timm_scripts, tmp_path, capsys):
    common = [
        '--data-dir', str(image_folder(tmp_path / 'data')), '--model', HNE, '--num-classes', '2', '--img-size', '16',
        '--device', 'cpu', '--batch-size', '4', '--workers', '0', '--amp', '--amp-dtype', 'bfloat16',
        '--channels-last',
    ]
    train = [
        'run', str(timm_scripts / 'train.py'), *common, '--lr', '0.05', '--warmup-epochs', '0',
        '--epochs', '2', '--output', str(tmp_path), '--experiment', 'run', '--model-ema', '--mixup', '0.2',
        '--grad-accum-steps', '2', '--hne-alpha', '0.75',
    ]
    main(train)
    log = capsys.readouterr().err
    assert 'alpha=0.75' in log and 'StockTaskWarning' not in log
    saved = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert (saved['hne_objective'], saved['hne_alpha']) == ('hierarchical_codistillation', 0.75)
    checkpoint = str(tmp_path / 'run' / 'last.pth.tar')
    timm.create_model(HNE, num_classes=2, checkpoint_path=checkpoint)

    main([*train, '--resume', checkpoint, '--epochs', '3'])
    log = capsys.readouterr().err
    assert 'Train: 2 ' in log and 'Train: 1 ' not in log

    main([
        'run', str(timm_scripts / 'validate.py'), *common, '--checkpoint', checkpoint, '--split', 'validation',
        '--model-kwargs', 'num_members=2'])
    assert '"top1"' in capsys.readouterr().out


@pytest.mark.parametrize('base', ['test_vit', 'test_convnext'])
def test_timms_own_scripts_and_a_tree_of_timms_stages(base, timm_scripts, hub, tmp_path, monkeypatch, capsys):
    """Trained, resumed, evaluated, exported, published and loaded again."""
    onnxruntime = pytest.importorskip('onnxruntime')
    monkeypatch.setenv('HF_TOKEN', 'hf_alice')
    monkeypatch.chdir(tmp_path)
    data, checkpoint, name = str(image_folder(tmp_path / 'data')), 'out/run/last.pth.tar', 'hne_from_timm'
    common = [
        '--data-dir', data, '--model', name, '--model-kwargs', f'base={base}', 'nodes=1,1,1,2', '--num-classes', '2',
        '--img-size', '32', '--device', 'cpu', '--batch-size', '4', '--workers', '0']
    train = [
        'run', str(timm_scripts / 'train.py'), *common, '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0',
        '--output', 'out', '--experiment', 'run']
    main([*train, '--epochs', '1'])
    first, _ = load_checkpoint(checkpoint)
    capsys.readouterr()
    main([*train, '--epochs', '2', '--resume', checkpoint])
    log = capsys.readouterr().err
    assert 'Train: 1 ' in log and 'Train: 0 ' not in log and 'StockTaskWarning' not in log
    trained, config = load_checkpoint(checkpoint)
    assert (trained.base, trained.nodes, trained.num_classes) == (base, (1, 1, 1, 2), 2)
    assert config['hne_objective'] == 'hierarchical_codistillation'
    changed = [
        name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, first.state_dict()[name])]
    assert {name.split('.')[0] for name in changed} == {'blocks', 'heads'}

    main(['run', str(timm_scripts / 'validate.py'), *common, '--checkpoint', checkpoint, '--split', 'validation'])
    assert '"top1"' in capsys.readouterr().out
    main(['eval', '--checkpoint', checkpoint, '--data-dir', data, '--split', 'validation', '--workers', '0',
          '--device', 'cpu', '--output', 'out/run/evaluation.json'])
    x = torch.randn(3, 3, 32, 32)
    expected = trained.eval()(x).detach()
    main(['export', name, '--checkpoint', checkpoint, '--format', 'onnx', '--num-members', '2', '--output', 'programs'])
    program, = Path('programs').glob('*.onnx')
    session = onnxruntime.InferenceSession(program)
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)

    main(['publish', checkpoint, '--repo-id', 'alice/net', '--dtype', 'float32'])
    loaded = timm.create_model('hf-hub:alice/net', pretrained=True).eval()
    assert (loaded.base, loaded.nodes) == (base, (1, 1, 1, 2))
    torch.testing.assert_close(loaded(x), expected)
