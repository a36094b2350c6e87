"""The kernel machine that your network is: path kernels for PyTorch Lightning."""

from lightning_pathkernel.alignment import centered_kernel_alignment, kernel_target_alignment
from lightning_pathkernel.callback import PathKernelCallback
from lightning_pathkernel.explanation import Explanation
from lightning_pathkernel.exporter import KernelMachineExporter
from lightning_pathkernel.functional import kernel_machine_agreement, kernel_machine_fidelity
from lightning_pathkernel.grouping import group_contributions
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.metrics import KernelMachineAgreement, KernelMachineFidelity
from lightning_pathkernel.store import ArtifactError, verify

__all__ = [
    "ArtifactError",
    "Explanation",
    "KernelMachine",
    "KernelMachineAgreement",
    "KernelMachineExporter",
    "KernelMachineFidelity",
    "PathKernelCallback",
    "centered_kernel_alignment",
    "group_contributions",
    "kernel_machine_agreement",
    "kernel_machine_fidelity",
    "kernel_target_alignment",
    "verify",
]
