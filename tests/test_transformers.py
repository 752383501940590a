"""Published models in transformers: the classes, logits and pictures are those that timm gives."""
import pytest
import timm
import torch
from PIL import Image
from test_hub import results_of, trained_model

from timm_hne.hub import write_folder

transformers = pytest.importorskip('transformers')

LABELS = ['ant', 'bee', 'cow', 'dog', 'eel', 'fox', 'gnu']


@pytest.fixture(scope='module', params=['hne_resnet50_c8', 'hne_mobilenetv2_075_e8'])
def folder(request, tmp_path_factory):
    nodes = (1, 1, 1, 2, 4) if 'resnet' in request.param else (1, 1, 2, 4)
    model = trained_model(request.param, nodes=nodes, num_classes=len(LABELS))
    model.classifier.weight.data /= 100  # else one class is so sure that the others tie
    folder = tmp_path_factory.mktemp('published') / 'net'
    write_folder(model, folder, 'hf-hub:alice/net', results_of(model), dict(epochs=1), label_names=LABELS)
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@torch.inference_mode()
def test_logits_are_those_of_timm(folder, model):
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert loaded.dtype == torch.float32
    assert list(loaded.config.id2label.values()) == LABELS
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x).logits, model(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded(x, num_members=1).logits, model(x, num_members=1), rtol=0, atol=0)


@torch.inference_mode()
def test_pipeline_prepares_pictures_as_timm_does(folder, model):
    image = Image.effect_noise((301, 250), 90).convert('RGB')
    found = transformers.pipeline('image-classification', model=str(folder))(image, top_k=len(LABELS))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0].tolist()
    assert {row['label']: row['score'] for row in found} == pytest.approx(dict(zip(LABELS, probabilities)), rel=1e-4)


@torch.inference_mode()
def test_features_and_another_head(folder, model, tmp_path):
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    features = transformers.AutoModel.from_pretrained(folder).eval()(x, output_hidden_states=True)
    expected = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=0).eval()(x)
    torch.testing.assert_close(features.pooler_output, expected)
    assert len(features.hidden_states) == len(model.nodes)

    other = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True).eval()
    other.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert other(x).logits.shape == (1, 3)
    torch.testing.assert_close(again(x).logits, other(x).logits)
