"""NVRTC of the package nvidia-cuda-nvrtc in the words of cupy.cuda.nvrtc, for machines without a GPU."""

import ctypes

from tools.msl.nvidia import nvrtc

logs: list[str] = []  # what the compiler said, a text for each compilation


class NVRTCError(RuntimeError):
    """What a call of NVRTC answered when it was not 0."""


def _check(code: int) -> None:
    if code:
        raise NVRTCError(nvrtc().nvrtcGetErrorString(code).decode())


def getVersion() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def createProgram(source: str, name: str, headers, include_names) -> ctypes.c_void_p:
    program = ctypes.c_void_p()
    arguments = source.encode(), name.encode(), 0, None, None
    _check(nvrtc().nvrtcCreateProgram(ctypes.byref(program), *arguments))
    return program


def compileProgram(program: ctypes.c_void_p, flags: tuple[str, ...]) -> None:
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    code = nvrtc().nvrtcCompileProgram(program, len(flags), options)
    logs.append(getProgramLog(program))
    _check(code)


def _result(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc(), f"nvrtcGet{what}")(program, data))
    return data.raw


def getCUBIN(program: ctypes.c_void_p) -> bytes:
    return _result(program, "CUBIN")


def getPTX(program: ctypes.c_void_p) -> str:
    return _result(program, "PTX").rstrip(b"\0").decode()


def getProgramLog(program: ctypes.c_void_p) -> str:
    return _result(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")


def destroyProgram(program: ctypes.c_void_p) -> None:
    _check(nvrtc().nvrtcDestroyProgram(ctypes.byref(program)))
