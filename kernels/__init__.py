"""Fused tensor operations: formula, torch reference, Triton kernels, dispatch. Imported as `expunge.kernels`.

A checkout's root on `sys.path` (`python -m`, a notebook, the REPL) lets this folder answer to the name `kernels`, which
belongs to a package of Hugging Face that transformers imports. Found under that name, the folder hands over to the
installed package; without one it stays silent, since transformers takes the name for "not installed" by its version.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        # The import system returns what stands in sys.modules at the end, not this module.
        sys.modules["kernels"] = _real = module_from_spec(_spec)
        _spec.loader.exec_module(_real)
