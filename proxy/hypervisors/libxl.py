"""The one thing that xl cannot do and its library can: make a domain from the JSON that ``xl list -l`` shows.

``xl create`` reads its own configuration language only. The calls are those of libxl.h of Xen 4.17, the same in 4.20.
For a process of its own: libxl starts children and takes SIGCHLD for itself.
"""

import ctypes
import ctypes.util
import json
from pathlib import Path
from typing import Any, Final

from proxy.errors import HypervisorFailed

_VERSION: Final = Path("/sys/hypervisor/version")  # of the hypervisor that runs: libxl must be of the same
_LIBXL_VERSION: Final = 0  # libxl.h
_CONFIG_BYTES: Final = 1 << 18  # struct libxl_domain_config has about 3 KiB; its size is known to C alone
_XTL_WARN: Final = 7  # xentoollog.h


def find() -> str:
    """The library's name or path.

    Raises:
        HypervisorFailed: there is none.
    """
    try:
        running = ".".join((_VERSION / part).read_text(encoding="ascii").strip() for part in ("major", "minor"))
        name: str | None = f"libxenlight.so.{running}"
        ctypes.CDLL(name)
    except OSError:
        name = ctypes.util.find_library("xenlight")
    if name is None:
        raise HypervisorFailed("there is no libxenlight here, which comes with xl")
    return name


class Libxl:
    """libxl's way to make a domain.

    Args:
        library: see ``find``.

    Raises:
        HypervisorFailed: it cannot be loaded, or lacks a function.
    """

    def __init__(self, library: str) -> None:
        try:
            self._lib: Any = ctypes.CDLL(library)
            for name in ("ctx_alloc", "ctx_free", "domain_create_new", "domain_unpause"):
                getattr(self._lib, f"libxl_{name}")
            for name in ("init", "dispose", "from_json"):
                getattr(self._lib, f"libxl_domain_config_{name}")
            # Of libxentoollog, which libxl needs itself. Without a logger its first complaint would be its last.
            logger = self._lib.xtl_createlogger_stdiostream
            logger.restype = ctypes.c_void_p
            self._logger = ctypes.c_void_p(logger(ctypes.c_void_p.in_dll(self._lib, "stderr"), _XTL_WARN, 0))
        except (OSError, AttributeError, ValueError) as error:
            raise HypervisorFailed(f"{library} cannot be used: {error}") from None

    def create(self, config: dict[str, Any]) -> int:
        """Make a domain and let it run; its id.

        Args:
            config: as ``xl list -l`` shows it under ``config``.

        Raises:
            HypervisorFailed: libxl cannot; it has said why on standard error.
        """
        info = {key: value for key, value in config["c_info"].items() if key != "domid"}  # the old id is not free yet
        text = json.dumps({**config, "c_info": info}).encode()
        lib, context = self._lib, ctypes.c_void_p()
        _check(lib.libxl_ctx_alloc(ctypes.byref(context), _LIBXL_VERSION, 0, self._logger), "cannot reach Xen")
        try:
            made, domid = ctypes.create_string_buffer(_CONFIG_BYTES), ctypes.c_uint32(0xFFFF_FFFF)
            lib.libxl_domain_config_init(made)
            try:
                _check(lib.libxl_domain_config_from_json(context, made, text), "does not understand the configuration")
                created = lib.libxl_domain_create_new(context, made, ctypes.byref(domid), None, None)
                _check(created, "cannot make the domain")
                _check(lib.libxl_domain_unpause(context, domid, None), "cannot unpause the domain")
            finally:
                lib.libxl_domain_config_dispose(made)
        finally:
            lib.libxl_ctx_free(context)
        return domid.value


def _check(code: int, what: str) -> None:
    if code:
        raise HypervisorFailed(f"libxl {what} (rc={code})")
