"""Eight bits: static quantisation after training, of the same step programs, by ONNX Runtime's tools."""
import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..models.anytime import check_images
from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..process import installed_version
from .engines import ENGINES, Engine, check_engine
from .folding import folded
from .optimize import OptimizedEnsemble
from .programs import Program, ProgramStore, frontier_tensors

_BATCH = 32
ENGINE_NAMES = ('openvino', 'onnxruntime')


class QuantizedEnsemble(OptimizedEnsemble):
    """What `quantize` returns: an optimised ensemble whose programs compute in 8 bits.

    Args:
        model: Folded model of which nobody else holds a reference.
        engine: Name of the engine.
        output_dtype: Type of the logits returned.
        images: Images to calibrate with.
    """

    def __init__(self, model: HierarchicalEnsemble, engine: str, output_dtype: torch.dtype, images: Tensor):
        super().__init__(model, engine, output_dtype)
        self.calibration_images = images

    @property
    def mode(self) -> str:
        """The engine and the type."""
        return f'{super().mode}, int8'

    def _make(self, name: str) -> Engine:
        if self.dtype != torch.float32:
            raise ValueError(f'a model in 8 bits is made of one in float32, got {self.dtype}: do not change its type.')
        images = self.calibration_images
        made_by = Path(__file__).read_bytes() + installed_version('onnxruntime').encode()
        salt = hashlib.sha256(made_by + images.numpy().tobytes()).hexdigest()
        plain = ProgramStore(self.model)
        store = ProgramStore(
            self.model, lambda model, *step: quantized_program(plain.get(*step), model, *step, images), salt)
        return ENGINES[name](self.model, store)


def quantize(
        model: HierarchicalEnsemble,
        calibration_images: Tensor,
        engine: str = 'openvino',
) -> QuantizedEnsemble:
    """Return a model that computes in 8 bits, with the interface of what `optimize_for_inference` returns.

    Post-training static quantisation by `onnxruntime.quantization`: weights per channel, symmetric; activations per
    tensor, in the range that they have on the calibration images. The programs are made when first needed and kept on
    disk, as those of `optimize_for_inference` are. Compare the accuracy before and after, for each number of members.

    It pays on processors with 8-bit dot products (VNNI, AMX), run by OpenVINO; ONNX Runtime gains little. Grouped
    convolutions of channels that are no multiple of 16, as `hne_mobilenetv2_075_*` has them, stay in float32.

    Args:
        model: Any hierarchical ensemble on a CPU in evaluation mode. It is not changed.
        calibration_images: Some hundred images `(B, C, H, W)` as they will come, normalised.
        engine: 'openvino' or 'onnxruntime'.

    Raises:
        TypeError: `model` is no hierarchical ensemble, or the images are no floating point tensor.
        ValueError: `model` is in training mode or not on a CPU, the images are none for it, or the engine is unknown.
        ImportError: The engine is not installed.
    """
    check_ensemble(model)
    if model.training:
        raise ValueError('model must be in evaluation mode, got one in training mode; call model.eval() first.')
    check_images(calibration_images, model.in_chans)
    if not len(calibration_images):
        raise ValueError('calibration_images must hold at least one image, got none.')
    if engine not in ENGINE_NAMES:
        raise ValueError(f'engine must be one of {", ".join(ENGINE_NAMES)} for 8 bits, got {engine!r}.')
    weight = next(model.parameters())
    check_engine(engine, weight.device, torch.float32)
    images = calibration_images.detach().float().cpu().contiguous()
    return QuantizedEnsemble(folded(model).float(), engine, weight.dtype, images)


def quantized_program(
        program: Program,
        model: HierarchicalEnsemble,
        start: int,
        stop: int,
        image_size: tuple[int, int],
        images: Tensor,
) -> Program:
    """Return a step's program in 8 bits, calibrated with images of any size that the program takes."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(images.split(_BATCH))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            named = frontier_tensors(model, batch, start)
            return {name: named[name].contiguous().numpy() for name in program.inputs}

    proto = onnx.load_from_string(program.data)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, 'program.onnx')
        quantize_static(
            proto, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=_left_in_float(proto))
        proto = onnx.load(path)
    proto.metadata_props.add(key='timm_hne', value=json.dumps(program.describe()))
    return dataclasses.replace(program, data=proto.SerializeToString())


def _left_in_float(proto) -> list[str]:
    """Return the convolutions that OpenVINO 2026.4 cannot compute in 8 bits, with "No reorder available".

    They have several groups, of channels that are no multiple of 16.
    """
    shapes = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    names = []
    for node in proto.graph.node:
        groups = next((entry.i for entry in node.attribute if entry.name == 'group'), 1)
        if node.op_type == 'Conv' and groups > 1 and node.input[1] in shapes:
            outputs, inputs = shapes[node.input[1]][:2]
            if inputs > 1 and (inputs % 16 or outputs // groups % 16):  # not depth-wise
                names.append(node.name)
    return names


@contextlib.contextmanager
def _quiet():
    """The tools advise a preparation of the model that folding and the exporter have done."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
