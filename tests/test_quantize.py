"""Programs in 8 bits, against the model that they are made from."""
import copy

import onnx
import pytest
import torch
from test_inference import images
from tiny import tiny_ensemble

import timm_hne
from timm_hne.inference import LatencyTable, early_exit, programs, quantize
from timm_hne.inference.folding import folded
from timm_hne.inference.quantize import quantized_program


@pytest.fixture(scope='module')
def calibration():
    return torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize('nodes, kind', [((1, 2, 4), 'branched'), ((1, 2), 'pairs')])
def test_logits_stay_close_for_every_number_of_members(calibration, nodes, kind):
    model, x = tiny_ensemble(nodes, kind, channels=16), images(40)
    before = copy.deepcopy(model.state_dict())
    small = quantize(model, calibration, engine='onnxruntime')
    for n in sorted({1, 3, nodes[-1]} & set(range(1, nodes[-1] + 1))):
        expected, found = model(x, num_members=n).detach(), small(x, num_members=n)
        assert found.dtype == expected.dtype
        error = (found - expected).pow(2).mean().sqrt() / expected.std()
        assert 0 < error < 0.1, 'in 8 bits, and not far from float32'
    assert small.mode == 'onnxruntime, int8'
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_step_is_in_8_bits_and_calibrated_with_its_own_features(calibration):
    model = folded(tiny_ensemble((1, 2, 4), channels=16))
    plain = programs.ProgramStore(model).get(1, 2, (8, 8))
    small = quantized_program(plain, model, 1, 2, (8, 8), calibration)
    kinds = [node.op_type for node in onnx.load_from_string(small.data).graph.node]
    assert 'QuantizeLinear' in kinds and 'DequantizeLinear' in kinds
    assert (small.inputs, small.new, small.frontier) == (plain.inputs, plain.new, plain.frontier)
    # Ranges are taken from the data: features that are ten times larger have scales that are ten times larger.
    def scale(program):
        graph = onnx.load_from_string(program.data).graph
        return max(
            onnx.numpy_helper.to_array(tensor).max() for tensor in graph.initializer
            if tensor.name.startswith('features') and tensor.name.endswith('scale'))

    large = quantized_program(plain, model, 1, 2, (8, 8), 10 * calibration)
    assert scale(large) > 2 * scale(small)


def test_what_openvino_cannot_compute_stays_in_float(calibration):
    """Several groups of channels that are no multiple of 16."""
    for channels, excluded in ((16, False), (24, True)):
        model = folded(tiny_ensemble((1, 2, 4), channels=channels))
        plain = programs.ProgramStore(model).get(0, 4, (8, 8))
        graph = onnx.load_from_string(quantized_program(plain, model, 0, 4, (8, 8), calibration).data).graph
        dequantized = {name for node in graph.node if node.op_type == 'DequantizeLinear' for name in node.output}
        weights = {node.input[1] for node in graph.node if node.op_type == 'Conv'}
        assert weights & dequantized and bool(weights - dequantized) == excluded


def test_the_rest_of_the_interface(calibration):
    model = tiny_ensemble((1, 2, 4), channels=16)
    small, x = quantize(model, calibration, engine='onnxruntime'), images(5)
    for n, logits in zip((1, 2, 4), small.anytime(x), strict=True):
        torch.testing.assert_close(logits, small(x, num_members=n))
    assert early_exit(small, x, 1.).num_members.tolist() == [4] * 5
    assert LatencyTable.measure(small, (3, 8, 8), batch_sizes=(1,), repeats=1).mode == 'onnxruntime, int8'
    twin = copy.deepcopy(small)
    torch.testing.assert_close(twin(x), small(x))


@pytest.mark.parametrize('change, error, words', [
    (dict(model=torch.nn.Linear(1, 1)), TypeError, 'model .*Linear'),
    (dict(calibration_images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), TypeError, 'uint8'),
    (dict(calibration_images=torch.zeros(4, 1, 8, 8)), ValueError, r'\(B, 3, H, W\)'),
    (dict(calibration_images=torch.zeros(0, 3, 8, 8)), ValueError, 'calibration_images'),
    (dict(engine='inductor'), ValueError, "engine .*openvino, onnxruntime.*'inductor'"),
])
def test_quantize_refuses(change, error, words):
    arguments = {
        'model': tiny_ensemble(), 'calibration_images': torch.zeros(4, 3, 8, 8), 'engine': 'onnxruntime', **change}
    with pytest.raises(error, match=words):
        quantize(**arguments)
    with pytest.raises(ValueError, match='training mode'):
        quantize(tiny_ensemble().train(), torch.zeros(4, 3, 8, 8), engine='onnxruntime')


def test_another_type_is_refused():
    small = quantize(tiny_ensemble((1, 2)), torch.randn(4, 3, 8, 8), engine='onnxruntime').to(torch.bfloat16)
    with pytest.raises(ValueError, match=r'onnxruntime.*float32'):
        small(images())
    with pytest.raises(ValueError, match=r'float32, got torch\.bfloat16'):  # which computes in bfloat16 else
        small._make('openvino')


def test_public_name():
    assert timm_hne.quantize is quantize
