"""Reads widths, tensor-core instructions and scratch from PTX and AMD assembly text.

In PTX the pointer argument behind each access is found by following the 64-bit address arithmetic from the kernel's
parameters; AMD's assembly keeps pointers in scalar registers, so that there widths are counted for the whole kernel.
"""

from __future__ import annotations

import re
from collections import Counter

Widths = dict[int, int]  # bits of an access -> how many instructions

_PARAMETER = re.compile(r"\.param \.u64 \.ptr \.global[^\n]*?_param_(\d+)")
_LOADED = re.compile(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_ADDRESS = re.compile(r"(?:@!?%p\d+ )?(?:add|sub|mad|mov|selp|or|cvta)\.[\w.]+\s+(%rd\d+), ([^;]*);")
_ACCESS = re.compile(r"\b(ld|st|atom|red)\.global([\w.:]*)\s[^;]*?\[ ?(%rd\d+)")
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s\[[^\]]*\], \[ ?(%rd\d+)[^\]]*\], (0x[0-9a-f]+|\d+)")
_TENSOR_CORES = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA"}
_AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}
_AMD_WIDTHS |= {"ubyte": 8, "sbyte": 8, "byte": 8}
_AMD_ACCESS = re.compile(
    r"\b(?:global|buffer)_(load|store)_(?:lds_)?(dwordx4|dwordx3|dwordx2|dword|[us]?short|[us]?byte)"
)


def count(widths: Widths, bits: int) -> None:
    widths[bits] = widths.get(bits, 0) + 1


def pointer_origins(ptx: str) -> dict[str, set[int]]:
    """For each 64-bit register the numbers of the pointer parameters that its address comes from."""
    pointers = {int(number) for number in _PARAMETER.findall(ptx)}
    origins: dict[str, set[int]] = {}
    for register, number in _LOADED.findall(ptx):
        if int(number) in pointers:
            origins.setdefault(register, set()).add(int(number))
    steps = [(result, re.findall(r"%rd\d+", operands)) for result, operands in _ADDRESS.findall(ptx)]
    grew = True
    while grew:  # loops carry addresses backwards: until nothing is new
        grew = False
        for result, operands in steps:
            found = set().union(*(origins.get(operand, set()) for operand in operands))
            if not found <= origins.get(result, set()):
                origins[result] = origins.get(result, set()) | found
                grew = True
    return origins


def ptx_accesses(ptx: str, arguments: list[str]) -> dict[str, dict[str, Widths]]:
    """`{"load" | "store" | "atomic": {argument: widths}}`; `arguments` names the parameters in order.

    Raises:
        ValueError: if an access cannot be led back to one argument.
    """
    origins = pointer_origins(ptx)
    result: dict[str, dict[str, Widths]] = {"load": {}, "store": {}, "atomic": {}}

    def note(kind: str, register: str, bits: int) -> None:
        found = sorted(origins.get(register, set()))
        names = "|".join(arguments[number] if number < len(arguments) else "scratch" for number in found)
        if not names:
            raise ValueError(f"{register} in the PTX leads back to no pointer argument")
        count(result[kind].setdefault(names, {}), bits)

    for word, modifiers, register in _ACCESS.findall(ptx):
        vector = re.search(r"\.v(\d)", modifiers)
        bits = int(re.findall(r"\.[bsuf]f?(\d+)", re.sub(r"\.v\d", "", modifiers))[-1])
        kind = {"ld": "load", "st": "store"}.get(word, "atomic")
        note(kind, register, bits * (int(vector[1]) if vector else 1))
    for register, size in _ASYNC.findall(ptx):
        note("load", register, 8 * int(size, 0))
    return result


def amd_accesses(text: str) -> dict[str, dict[str, Widths]]:
    """The same for AMD's assembly, with one entry, "all", for every argument."""
    result: dict[str, dict[str, Widths]] = {"load": {}, "store": {}, "atomic": {}}
    for kind, width in _AMD_ACCESS.findall(text):
        count(result[kind].setdefault("all", {}), _AMD_WIDTHS[width])
    return result


def tensor_cores(text: str) -> dict[str, int]:
    """How many matrix instructions of each kind stand in PTX or AMD assembly."""
    found: Counter[str] = Counter()
    for mark, name in _TENSOR_CORES.items():
        found[name] += len(re.findall(rf"\b{re.escape(mark)}\.", text))
    for name in re.findall(r"\bv_mfma_\w+", text):
        found[name.removeprefix("v_")] += 1
    return {name: count for name, count in found.items() if count}


def half_dots(ttir: str) -> int:
    """How many dots take float16 or bfloat16 operands in Triton's IR."""
    return len(re.findall(r"tt\.dot [^\n]*: tensor<[\dx]+x(?:f16|bf16)> \*", ttir))
