"""A device for tests that computes on the CPU and records every operation that would make a GPU program wait.

An operation waits if the host needs a value or a shape that only the device knows: ``tolist``, ``nonzero``, indexing
with a mask, a copy to the host. A copy from the host waits too, unless it is ``non_blocking``, because it is queued
behind all that the device has to do. An operation that mixes tensors of both devices raises, as on a GPU.

    with EmulatedDevice() as device:
        move(model)
        model([on_device(image)], [{name: on_device(value) for name, value in target.items()}])
    assert not device.waits

It says nothing about kernels, speed or memory.
"""

import collections
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cpm_rcnn

NAME = "emulated"
_PROJECT = str(Path(cpm_rcnn.__file__).parent)
# Operations whose result is a value on the host, or has a shape that depends on values.
_WAITING = {
    *("_local_scalar_dense", "equal", "is_nonzero", "item"),
    *("nonzero", "masked_select", "bincount", "repeat_interleave", "unique_consecutive", "unique_dim", "_unique2"),
    "torchvision.nms",
}
_COPIES = {"_to_copy", "copy_"}
# What autocast computes in the lower precision and in float32, as on a GPU.
_LOW_PRECISION = ("conv2d", "conv_transpose2d.input", "linear", "addmm", "mm", "bmm", "matmul")
_FLOAT32 = (
    *("softmax.int", "log_softmax.int", "group_norm", "layer_norm", "binary_cross_entropy_with_logits"),
    *("smooth_l1_loss", "nll_loss", "pow.Tensor_Scalar", "sum", "cumsum"),
)
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class EmulatedTensor(torch.Tensor):
    """A tensor on the emulated device, whose values are in a tensor of the CPU."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=torch.device(NAME, 0),
            requires_grad=data.requires_grad,
        )

    def __init__(self, data):
        self.data_on_cpu = data

    def __repr__(self, *, tensor_contents=None):
        return f"EmulatedTensor({self.data_on_cpu!r})"

    def tolist(self):
        EmulatedDevice.record("tolist")
        return self.data_on_cpu.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert a tensor of {NAME} to numpy: copy it to the host first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class EmulatedDevice(TorchDispatchMode):
    """Within this context, tensors can be on the device.

    Attributes:
        waits: how often each line of the package waited for the device: ``"models/rpn.py:115: nonzero"`` to a number.
    """

    _active = None

    def __init__(self):
        _register()
        super().__init__()
        self.waits = collections.Counter()

    def __enter__(self):
        EmulatedDevice._active = self
        # Autograd has no thread for a device that was registered after its first backward pass.
        self._one_thread = torch.autograd.grad_mode.set_multithreading_enabled(False)
        return super().__enter__()

    def __exit__(self, *exception):
        EmulatedDevice._active = None
        self._one_thread.__exit__(*exception)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def take_waits(self):
        """``waits`` until now, which are counted from zero again."""
        waits, self.waits = self.waits, collections.Counter()
        return waits

    @classmethod
    def record(cls, operation):
        """Count a wait of the line of the package that is running."""
        if cls._active is not None:
            cls._active.waits[f"{_running_line()} {operation}"] += 1


def on_device(tensor):
    """A copy of a CPU tensor on the device."""
    return EmulatedTensor(tensor.detach().clone()).requires_grad_(tensor.requires_grad)


def on_host(tensor):
    """A copy of a tensor of the device on the CPU, which is not counted as a wait."""
    return tensor.detach().data_on_cpu.clone()


def move(module):
    """Move the parameters and buffers of a module to the device, in place."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                moved = torch.nn.Parameter(on_device(parameter.detach()), requires_grad=parameter.requires_grad)
                child._parameters[name] = moved
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = on_device(buffer)
    return module


def _run(func, args, kwargs):
    """Check an operation, and compute it on the CPU."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        # In inference mode, the operations that it consists of do not arrive by themselves.
        return func.decompose(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::").replace("::", ".")
    tensors = [leaf for leaf in _leaves([args, *kwargs.values()]) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, EmulatedTensor)]
    device = kwargs.get("device")
    target = None if device is None else torch.device(device).type
    _check_devices(name, args, kwargs, tensors, ours, target)
    computed = func(*_map(_to_cpu, args), **_cpu_arguments(kwargs, target))
    if target == "cpu" or not (ours or target == NAME) or name == "_local_scalar_dense":
        return computed
    if name.endswith("_") and not name.endswith("__"):  # in place
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return _map(lambda x: EmulatedTensor(x) if isinstance(x, torch.Tensor) else x, computed)


def _check_devices(name, args, kwargs, tensors, ours, target):
    """Record a wait, or raise if tensors of two devices meet."""
    if name in _COPIES:
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        to_host = ours and (target == "cpu" if name == "_to_copy" else not isinstance(args[0], EmulatedTensor))
        to_device = (not ours and target == NAME) if name == "_to_copy" else (len(ours) == 1 and not to_host)
        if to_host or (to_device and blocking):
            EmulatedDevice.record("copy to the host" if to_host else "copy from the host")
        return
    if not ours:
        return
    # A number of the host, which has no dimension, is an argument of the kernel.
    others = [tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor) and tensor.dim()]
    indices = args[1] if name in _INDEXING else ()
    if others:
        if not (indices and isinstance(args[0], EmulatedTensor)):
            raise RuntimeError(f"{name}: tensors on {NAME} and on cpu, shapes {[tuple(x.shape) for x in tensors]}")
        EmulatedDevice.record(f"{name} with indices of the host")
    masks = [index for index in indices if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)]
    sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
    if masks:
        EmulatedDevice.record(f"{name} with a mask")
    elif name in _WAITING and not sized:
        EmulatedDevice.record(name)


def _map(function, value):
    """``value`` with ``function`` applied to all that is not a list or a tuple."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, each) for each in value])
    return function(value)


def _leaves(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _to_cpu(value):
    if isinstance(value, EmulatedTensor):
        return value.data_on_cpu
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _cpu_arguments(kwargs, target):
    arguments = {name: _map(_to_cpu, value) for name, value in kwargs.items()}
    if target == NAME:
        arguments["device"] = torch.device("cpu")
        arguments.pop("pin_memory", None)
    return arguments


def _running_line():
    """File and line of the innermost frame of the package."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(_PROJECT):
        frame = frame.f_back
    if frame is None:
        return "outside the package:"
    return f"{frame.f_code.co_filename.removeprefix(_PROJECT).lstrip('/')}:{frame.f_lineno}:"


def _copy_from(source, target, non_blocking=False):
    # torch.tensor(..., device=...) arrives here and not in the mode.
    if not isinstance(source, EmulatedTensor) and not non_blocking:
        EmulatedDevice.record("copy from the host")
    _to_cpu(target).copy_(_to_cpu(source))
    return target


def _autocast(operation, dtype):
    """The kernel of ``operation`` under autocast; ``dtype`` returns the type that it computes in."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value):
        floating = isinstance(value, EmulatedTensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype()) if floating else value

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*_map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return kernel


_libraries = []


def _register():
    """Make the device known to torch, once per process."""
    if _libraries:
        return
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Backend(_DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.float16, torch.bfloat16]

        # The device has no generator of its own; torch.random.fork_rng asks every device of the process for its state.
        def get_rng_state(self, device=None):
            return torch.zeros(0, dtype=torch.uint8)

        def set_rng_state(self, state, device=None):
            assert not len(state)

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Backend())
    aten = torch.library.Library("aten", "IMPL")
    others = torch.library.Library("_", "IMPL")
    _libraries.extend([aten, others])  # what is registered exists as long as its library
    implementations = {
        "empty_strided": lambda size, stride, *, dtype=None, **_: EmulatedTensor(
            torch.empty_strided(size, stride, dtype=dtype)
        ),
        "empty.memory_format": lambda size, *, dtype=None, **_: EmulatedTensor(torch.empty(size, dtype=dtype)),
        "_copy_from": _copy_from,
    }
    for name, implementation in implementations.items():
        aten.impl(name, implementation, "PrivateUse1")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    kinds = (_LOW_PRECISION, lambda: torch.get_autocast_dtype(NAME)), (_FLOAT32, lambda: torch.float32)
    for names, dtype in kinds:
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, _autocast(operation, dtype), "AutocastPrivateUse1")
