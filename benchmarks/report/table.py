"""The report on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from report.assembly import Widths
from report.count import Counted
from report.measure import Driven, Record
from report.roofline import DEVICES, bound_us

WIDTH = 200


def widths_text(arguments: dict[str, Widths]) -> str:
    """`x 128b x4, g 32b x2`, by argument."""
    parts = []
    for name, widths in sorted(arguments.items()):
        counts = " ".join(f"{bits}b x{count}" for bits, count in sorted(widths.items(), reverse=True))
        parts.append(f"{name.replace('_ptr', '')} {counts}")
    return ", ".join(parts)


def print_kernels(records: Sequence[Record]) -> None:
    """One line for each specialisation and target."""
    table = Table(title=f"Compiled kernels ({len(records)} specialisations and targets)", title_justify="left")
    names = ("kernel", "target", "compiled in", "cases", "regs", "spill", "shared", "occupancy", "loads", "stores")
    for name in (*names, "tensor cores"):
        table.add_column(name, overflow="fold")
    for record in sorted(records, key=lambda one: (one.op, one.kernel, str(one.pointers) + str(one.constants))):
        constants = " ".join(f"{name}={value}" for name, value in (record.pointers | record.constants).items())
        stores = {**record.accesses["store"], **{f"atomic {k}": v for k, v in record.accesses["atomic"].items()}}
        taken = record.resources
        table.add_row(
            record.kernel,
            record.target,
            f"{constants.replace('_ptr=', ':')} warps={record.warps} stages={record.stages}",
            str(len(record.cases)),
            str(taken.registers),
            str(taken.spill),
            str(taken.shared),
            f"{taken.occupancy:.0%}",
            widths_text(record.accesses["load"]),
            widths_text(stores),
            " ".join(f"{name} x{count}" for name, count in record.tensor_cores.items())
            or ("NONE" if record.half_dots else "-"),
        )
    Console(width=WIDTH).print(table)


def launches_text(launches: Sequence[tuple[str, int]]) -> str:
    """`name x2 (64 programs)`, in the order of first launch."""
    times = Counter(name for name, _ in launches)
    programs = {name: sum(count for other, count in launches if other == name) for name in times}
    return ", ".join(f"{name} x{times[name]} ({programs[name]} programs)" for name in times)


def print_cases(driven: Sequence[Driven], targets: Sequence[str], counts: Mapping[tuple[str, str], Counted]) -> None:
    """One line for each case: what it launches, what it must move and what it moves, and the bound on each device."""
    table = Table(title="Cases; bounds in microseconds, from data-sheet bandwidths and peaks", title_justify="left")
    for name in (
        "op",
        "case",
        "launches",
        "least B",
        "asked / least",
        "unique / least",
        "flops",
        *(DEVICES[target].name for target in targets),
    ):
        table.add_column(name, overflow="fold")
    for drive in driven:
        case = drive.case
        count = counts.get((case.op, case.name))
        ratios = ("-", "-") if count is None else (f"{one / case.least:.3f}" for one in (count.asked, count.unique))
        bounds = [bound_us(DEVICES[target], case.least, case.flops, case.dot_bits) for target in targets]
        table.add_row(
            case.op,
            case.name,
            launches_text(drive.launches),
            f"{case.least:,}",
            *ratios,
            f"{case.flops:,}",
            *(f"{time:.2f} {what}" for time, what in bounds),
        )
    Console(width=WIDTH).print(table)
