"""vLLM's V2 model runner on this CPU: its Triton kernels interpreted, which is slow, but the code that a GPU runs.

Triton takes backends from entry points. The one written here is never asked to compile anything: vLLM only wants to see
that there is one for a CPU.
"""

from pathlib import Path

COMPILER = """
from triton.backends.compiler import BaseBackend


class Compiler(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        raise NotImplementedError

    def parse_options(self, options):
        raise NotImplementedError

    def add_stages(self, stages, options, *rest):
        raise NotImplementedError

    def load_dialects(self, context):
        raise NotImplementedError

    def get_module_map(self):
        raise NotImplementedError
"""
DRIVER = """
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")
"""


def v2_environment(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to run the V2 model runner; `folder` gets the backend."""
    package, announced = folder / "interpreted_backend", folder / "interpreted_backend-0.dist-info"
    package.mkdir(parents=True)
    announced.mkdir()
    (package / "__init__.py").write_text("")
    (package / "compiler.py").write_text(COMPILER)
    (package / "driver.py").write_text(DRIVER)
    (announced / "METADATA").write_text("Metadata-Version: 2.1\nName: interpreted-backend\nVersion: 0\n")
    (announced / "entry_points.txt").write_text("[triton.backends]\ncpu = interpreted_backend\n")
    return {
        "PYTHONPATH": str(folder),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
