"""One record for each compiled specialisation and target, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm
from triton.compiler import CompiledKernel

from report.assembly import Widths, amd_accesses, half_dots, ptx_accesses, tensor_cores
from report.case import Case
from report.drive import TARGETS, Launch, launches_of
from report.resources import Resources, resources_of

GRID_LIMIT = (2**31 - 1, 65535, 65535)  # programs along each axis
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block
WIDE = 128  # bits of the widest access of one thread that every target has


@dataclass
class Record:
    """A kernel as compiled for one target, and the cases that launch it."""

    op: str
    kernel: str
    target: str
    pointers: dict[str, str]
    constants: dict[str, str]
    warps: int
    stages: int
    resources: Resources
    accesses: dict[str, dict[str, Widths]]
    tensor_cores: dict[str, int]
    half_dots: int
    cases: list[str] = field(default_factory=list)
    streams: set[str] = field(default_factory=set)

    def problems(self) -> list[str]:
        """Spills, too much shared memory, half dots without tensor cores, narrow streams; empty if all is well."""
        found = []
        if self.resources.spill:
            found.append(f"spills {self.resources.spill} bytes")
        if self.resources.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.resources.shared} bytes of shared memory, over {SHARED_LIMIT[self.target]}")
        if self.half_dots and not self.tensor_cores:
            found.append("half-precision dot without tensor cores")
        for kind, arguments in self.accesses.items():
            for name, widths in arguments.items():
                if name in self.streams and kind != "atomic" and min(widths) < WIDE:
                    found.append(f"{kind}s of {name} in {min(widths)} bits")
        return found


def argument_names(kernel: CompiledKernel) -> list[str]:
    """Names of the arguments that reach the device, in order: constants are compiled in."""
    return [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]


def constants_of(kernel: CompiledKernel) -> dict[str, str]:
    """Names and values of what was compiled in."""
    names = list(kernel.src.signature)
    return {names[path[0]]: str(value) for path, value in kernel.src.constants.items() if len(path) == 1}


def pointers_of(kernel: CompiledKernel) -> dict[str, str]:
    """Names and dtypes of the pointers; one that is not aligned to 16 bytes is marked."""
    found = {}
    for index, (name, kind) in enumerate(kernel.src.signature.items()):
        if isinstance(kind, str) and kind.startswith("*"):
            aligned = ["tt.divisibility", 16] in kernel.src.attrs.get((index,), [])
            found[name] = kind[1:] if aligned else f"{kind[1:]} unaligned"
    return found


def record_of(op: str, target: str, launch: Launch) -> Record:
    """Everything that the compiler's outputs say about one kernel."""
    kernel, meta = launch.kernel, launch.kernel.metadata
    cuda = meta.target.backend == "cuda"
    text = kernel.asm["ptx" if cuda else "amdgcn"]
    return Record(
        op=op,
        kernel=meta.name,
        target=target,
        pointers=pointers_of(kernel),
        constants=constants_of(kernel),
        warps=meta.num_warps,
        stages=meta.num_stages,
        resources=resources_of(kernel),
        accesses=ptx_accesses(text, argument_names(kernel)) if cuda else amd_accesses(text),
        tensor_cores=tensor_cores(text),
        half_dots=half_dots(kernel.asm["ttir"]),
    )


@dataclass
class Driven:
    """A case as it was launched: kernels and programs in the order of the launches."""

    case: Case
    launches: list[tuple[str, int]]
    too_large: list[str]


def drive_record(case: Case, launches: Sequence[Launch]) -> Driven:
    """Names and programs of a case's launches, and the grids that no GPU takes."""
    named = [(one.kernel.metadata.name, one) for one in launches]
    large = [
        f"{name}: grid {one.grid}"
        for name, one in named
        if any(extent > limit for extent, limit in zip(one.grid, GRID_LIMIT, strict=False))
    ]
    return Driven(case, [(name, one.programs) for name, one in named], large)


def measure(cases: Sequence[Case], targets: Sequence[str] = tuple(TARGETS)) -> tuple[list[Record], list[Driven]]:
    """Compiles all cases for all targets; specialisations that several cases launch are measured once."""
    records: dict[tuple[str, str], Record] = {}
    driven = {}
    for target in targets:
        for case in tqdm(cases, desc=target, disable=None):  # compiling takes minutes: tell a terminal how far it is
            launches = launches_of(case, TARGETS[target])
            driven[case.op, case.name] = drive_record(case, launches)
            unknown = set(case.streams) - {name for one in launches for name in one.kernel.src.signature}
            if unknown:
                raise SystemExit(f"{case.op}, {case.name}: no kernel has the streams {sorted(unknown)}")
            for launch in launches:
                key = (target, launch.kernel.metadata.hash)
                if key not in records:
                    records[key] = record_of(case.op, target, launch)
                if case.name not in records[key].cases:
                    records[key].cases.append(case.name)
                records[key].streams |= set(case.streams)
    return list(records.values()), list(driven.values())


def all_problems(records: Sequence[Record], driven: Sequence[Driven]) -> Iterator[str]:
    """What is wrong, one line each."""
    for one in driven:
        yield from (f"{text} over {GRID_LIMIT} ({one.case.name})" for text in one.too_large)
    for record in records:
        for problem in record.problems():
            yield f"{record.kernel} {record.target} {record.constants}: {problem} ({record.cases[0]})"
