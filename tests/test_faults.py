"""Errors of a device are told from those of a model, in whatever error they are wrapped."""

from __future__ import annotations

import errno

import pytest
import torch

from attnsurgery.errors import UsageError
from attnsurgery.faults import Fault, fault_of

HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call.\nCompile with `TORCH_USE_CUDA_DSA`."
)

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    f"CUDA error: out of memory{HINT}",
    "CUDA driver error: out of memory",
    "HIP error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9",
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);",
    "NCCL error in: ProcessGroupNCCL.cpp:2, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "DataLoader worker (pid 4499) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.",
    "DataLoader worker (pid 4499) is killed by signal: Killed. ",
    "Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
    "unable to mmap 1024 bytes from file </torch_1_2_3>: Cannot allocate memory (12)",
    "unable to write to file </torch_1_2_3>: No space left on device (28)",
]
DEVICE = [
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0",
    "CUDNN failure 4: CUDNN_STATUS_INTERNAL_ERROR ; GPU=0 ; hostname=a ; expr=cudnnConvolutionForward(",
    f"CUDA error: an illegal memory access was encountered{HINT}",
    f"CUDA error: device-side assert triggered{HINT}",
    "CUDA error: unspecified launch failure",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`",
    "CUDA driver error: device not ready",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_MAPPING_ERROR",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "NCCL error in: ProcessGroupNCCL.cpp:2, unhandled system error, NCCL version 2.27.7\nncclSystemError: System call",
    "DataLoader worker (pid(s) 17, 18) exited unexpectedly",
    "DataLoader worker (pid 17) is killed by signal: Segmentation fault. ",
]
OF_THE_MODEL = [
    "mat1 and mat2 shapes cannot be multiplied (2x768 and 512x10)",
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block sizes may help.",
    "CUDA error: too many resources requested for launch",
    "CUDA error: invalid configuration argument",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "CUDA error: operation not permitted when stream is capturing",
    "CUDA error: operation failed due to a previous error during capture",
    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned.",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "Torch not compiled with CUDA enabled",
]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        *((message, Fault.OUT_OF_MEMORY) for message in OUT_OF_MEMORY),
        *((message, Fault.DEVICE) for message in DEVICE),
        *((message, None) for message in OF_THE_MODEL),
    ],
)
def test_fault_is_told_by_the_message(message: str, fault: Fault | None) -> None:
    """The message of an error says whether memory was lacking, the device broke, or the model is at fault."""
    assert fault_of(RuntimeError(message)) is fault


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="torch before 2.8 raises RuntimeError")
def test_fault_of_accelerator_error() -> None:
    """An AcceleratorError is a fault of the device unless its message says memory or a wrong configuration."""
    assert fault_of(torch.AcceleratorError("something new")) is Fault.DEVICE
    assert fault_of(torch.AcceleratorError(f"CUDA error: out of memory{HINT}")) is Fault.OUT_OF_MEMORY
    assert fault_of(torch.AcceleratorError("CUDA error: invalid configuration argument")) is None


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("a forced lack of memory"), MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")],
    ids=lambda error: type(error).__name__,
)
def test_fault_of_memory_error_types(error: Exception) -> None:
    """Types of errors that mean a lack of memory need no message."""
    assert fault_of(error) is Fault.OUT_OF_MEMORY


def wrapped(how: str, inner: Exception) -> Exception:
    outer = UsageError("ResNet cannot run under the conditions of this measurement")
    try:
        try:
            raise inner
        except Exception as error:
            if how == "cause":
                raise outer from error
            if how == "hidden":
                raise outer from None
            raise outer  # noqa: B904
    except UsageError as error:
        return error


@pytest.mark.parametrize("how", ["cause", "context", "hidden"])
def test_fault_of_wrapped_error(how: str) -> None:
    """A fault is recognised through the cause, the context and a hidden context of an error."""
    assert fault_of(wrapped(how, torch.OutOfMemoryError("CUDA out of memory."))) is Fault.OUT_OF_MEMORY
    assert fault_of(wrapped(how, RuntimeError(DEVICE[0]))) is Fault.DEVICE
    assert fault_of(wrapped(how, RuntimeError(OF_THE_MODEL[0]))) is None


def test_fault_nearest_to_surface_holds() -> None:
    """A device that broke while memory was being freed is broken."""
    outer = RuntimeError(DEVICE[0])
    outer.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert fault_of(outer) is Fault.DEVICE


def test_fault_in_compiler_backend_is_found() -> None:
    """A lack of memory is recognised inside the error of a compiler backend."""

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = torch.compile(torch.nn.Linear(2, 2), backend=backend)
    with pytest.raises(Exception) as caught:  # noqa: PT011  (a class of dynamo's own)
        model(torch.zeros(1, 2))
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    assert fault_of(caught.value) is Fault.OUT_OF_MEMORY


def test_fault_of_circular_causes_terminates() -> None:
    """Errors that are each other's cause do not loop for ever."""
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert fault_of(one) is None
