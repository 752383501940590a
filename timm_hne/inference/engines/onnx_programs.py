"""Engines that run the steps as ONNX programs: ONNX Runtime and OpenVINO."""
import copy
import importlib.util
import threading
from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...models.ensemble import HierarchicalEnsemble
from ...runtime import Session
from ..programs import Program, ProgramStore
from .base import Engine, Frontier

# Takes arrays in the order of the program's inputs to arrays in the order of its outputs.
Runner = Callable[[list[np.ndarray]], list[np.ndarray]]


class ProgramEngine(Engine):
    """Runs the steps as ONNX programs, which are made when first asked for and kept on disk.

    Args:
        model: Folded ensemble, which belongs to the engine.
        store: Where the programs come from; a store of the model's own if None.
    """
    stepwise = True
    packages: tuple[str, ...] = ('onnx', 'onnxscript', 'onnxruntime')
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def __init__(self, model: HierarchicalEnsemble, store: ProgramStore | None = None):
        super().__init__(model)
        self.threads = torch.get_num_threads()
        self._store = ProgramStore(model) if store is None else store
        self._loaded: dict[tuple, tuple[Program, Runner]] = {}
        self._lock = threading.RLock()

    @classmethod
    def missing(cls) -> list[str]:
        return [package for package in cls.packages if importlib.util.find_spec(package) is None]

    @classmethod
    def obstacle(cls, device: torch.device, dtype: torch.dtype) -> str:
        if device.type != 'cpu':
            return f'it serves models on a CPU, this one is on {device}'
        if dtype not in cls.dtypes:
            return f'it computes in {" or ".join(str(d).removeprefix("torch.") for d in cls.dtypes)}, not in {dtype}'
        return ''

    @abstractmethod
    def load(self, program: Program) -> Runner:
        """Make a program ready to run, from any number of threads at once."""

    def step(self, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
        if start == 0:
            frontier = tuple(frontier[0].shape[2:]), {'images': frontier[0].float()}
        image_size, features = frontier
        try:
            program, run = self._program(start, stop, image_size)
            outputs = run([features[name].contiguous().numpy() for name in program.inputs])
        except Exception as error:
            raise RuntimeError(
                f"engine {self.name!r} cannot take the step from {start} to {stop} members: {error}. PyTorch's own "
                "engines, 'inductor' and 'eager', run whatever the model does.") from error
        new = dict(zip(program.new, map(torch.from_numpy, outputs)))
        features = {**features, **new}
        return new['logits'], (image_size, {name: features[name] for name in program.frontier})

    def _program(self, start: int, stop: int, image_size: tuple[int, int]) -> tuple[Program, Runner]:
        for key in ((start, stop, None), (start, stop, image_size)):
            if key in self._loaded:
                return self._loaded[key]
        with self._lock:
            for key in ((start, stop, None), (start, stop, image_size)):
                if key in self._loaded:
                    return self._loaded[key]
            program = self._store.get(start, stop, image_size)
            found = self._loaded[start, stop, program.image_size] = program, self.load(program)
            return found


class OnnxRuntime(ProgramEngine):
    """ONNX Runtime, on the CPU in float32."""
    name = 'onnxruntime'
    extra = 'export'

    def load(self, program: Program) -> Runner:
        session = Session(program.data, self.threads)
        return lambda arrays: session.run(dict(zip(program.inputs, arrays)))


class OpenVINO(ProgramEngine):
    """OpenVINO, on the CPU; bfloat16 is for processors that have instructions for it."""
    name = 'openvino'
    extra = 'openvino'
    packages = ('openvino', *ProgramEngine.packages)
    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, model: HierarchicalEnsemble, store: ProgramStore | None = None):
        # By itself OpenVINO would compute in bfloat16 wherever the processor can.
        self._precision = {torch.float32: 'f32', torch.bfloat16: 'bf16'}[next(model.parameters()).dtype]
        # Programs are of float32 always; the model itself stays as it is, others use it.
        super().__init__(model if self._precision == 'f32' else copy.deepcopy(model).float(), store)

    def load(self, program: Program) -> Runner:
        import openvino

        compiled = openvino.Core().compile_model(openvino.Core().read_model(program.data), 'CPU', {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': self._precision,
            'INFERENCE_NUM_THREADS': self.threads,
        })
        local = threading.local()  # a request serves one thread at a time

        def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
            if not hasattr(local, 'request'):
                local.request = compiled.create_infer_request()
            # The outputs are copied: the request writes the next ones in the same place.
            results = local.request.infer(dict(zip(program.inputs, arrays)), share_inputs=True, share_outputs=False)
            return [results[name] for name in program.outputs]

        return run
