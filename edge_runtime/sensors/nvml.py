"""NVIDIA's GPUs through NVML, the library of their driver, and the optional package `nvidia-ml-py`.

Units and bits as in NVIDIA's "NVML API Reference Guide".
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .linux import plausible_c
from .machine import Machine, Sensor
from .reading import Rail, Reading

_TEMPERATURE_GPU = 0  # NVML_TEMPERATURE_GPU
_MOST_W = 10_000.0
# nvmlClocksEventReasons; left out are idling (1), clocks set by a user (2, 0x100) and by a neighbour (0x10)
_REASONS = {
    0x004: "gpu-power-cap",
    0x008: "gpu-hardware-slowdown",
    0x020: "gpu-thermal",
    0x040: "gpu-hardware-thermal",
    0x080: "gpu-power-brake",
    0x200: "gpu-board-limit",
    0x400: "gpu-reliability",
}
# The names of today, then those of drivers and packages that do not have them.
_TEMPERATURE = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
_CLOCK_REASONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


def find_nvml(machine: Machine, nvml: Any = None) -> list[Sensor]:
    """One sensor for all GPUs; none without the package, driver or a GPU, nor for a recording: NVML reads no files.

    `nvml` has the functions of the module `pynvml`; by default it is that module.
    """
    if machine.root != Path("/"):
        return []
    nvml = nvml if nvml is not None else _module()
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
        gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # NVMLError, and whatever a broken driver does
        return []
    return [NvmlSensor(nvml, gpus)] if gpus else []


class NvmlSensor:
    """All GPUs: their power together and as rails, the hottest temperature, and why clocks are held down.

    The powers are those of the GPUs' boards and therefore rails: the machine around them is not known.
    """

    name = "nvml"

    def __init__(self, nvml: Any, gpus: Sequence[Any]) -> None:
        """`gpus` are NVML's handles, in its order."""
        self._nvml = nvml
        self._gpus = tuple(gpus)

    def read(self, time_s: float) -> Reading:
        rails = tuple(Rail(f"gpu{i}", w) for i, gpu in enumerate(self._gpus) if (w := self._power_w(gpu)) is not None)
        temps = [temp_c for gpu in self._gpus if (temp_c := self._temp_c(gpu)) is not None]
        throttled = [reasons for gpu in self._gpus if (reasons := self._throttled(gpu)) is not None]
        if not (rails or temps or throttled):
            return Reading(time_s)
        return Reading(
            time_s,
            rails=rails,
            temp_c=max(temps, default=None),
            throttled_now=frozenset().union(*throttled) if throttled else None,
            sensors=(self.name,),
        )

    def _power_w(self, gpu: Any) -> float | None:
        milliwatts = self._ask(("nvmlDeviceGetPowerUsage",), gpu)
        return milliwatts * 1e-3 if milliwatts is not None and 0 < milliwatts * 1e-3 <= _MOST_W else None

    def _temp_c(self, gpu: Any) -> float | None:
        return plausible_c(self._ask(_TEMPERATURE, gpu, _TEMPERATURE_GPU))

    def _throttled(self, gpu: Any) -> frozenset[str] | None:
        bits = self._ask(_CLOCK_REASONS, gpu)
        if bits is None or bits < 0:
            return None
        return frozenset(word for bit, word in _REASONS.items() if int(bits) & bit)

    def _ask(self, functions: Sequence[str], *args: Any) -> float | None:
        """The finite number that the first of `functions` gives; None if each is missing, fails or gives none."""
        for function in functions:
            try:
                value = float(getattr(self._nvml, function)(*args))
            except Exception:  # a GPU that fell off the bus, one that has no such sensor, an older driver
                continue
            if math.isfinite(value):
                return value
        return None


def _module() -> Any:
    """The module pynvml; None if it is not installed or does not load."""
    try:
        return importlib.import_module("pynvml")
    except Exception:  # not only ImportError: other packages of that name warn, or load a driver as they are imported
        return None
