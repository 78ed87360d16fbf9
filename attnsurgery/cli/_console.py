"""All output of the commands; the other layers return data or call back, and never print.

A terminal gets colours and its own width. A pipe or file gets plain lines that are never wrapped, so that `grep` and
`cut` see complete lines. Results go to stdout; errors and progress go to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from attnsurgery.graph.anatomy import Anatomy
    from attnsurgery.graph.site import Site
    from attnsurgery.latency import Comparison, Latency, Singles
    from attnsurgery.latency.self_test import SelfTest
    from attnsurgery.recipe.plan import Plan, PlannedBlock, Priced
    from attnsurgery.surgery.verify import Report

_UNWRAPPED = 100_000
"""Width of lines that are not wrapped."""
_STEP = 4
"""Columns by which a tree indents one level."""
_ROLE_STYLE = {"block": "bold", "branch": "cyan"}
"""Styles of the roles that are shown by default; the others are dim."""


def stdout() -> Console:
    """A console on the present standard output."""
    return _console(sys.stdout)


def stderr() -> Console:
    """A console on the present standard error."""
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
    width = None if file.isatty() else _UNWRAPPED
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def print_error(message: str) -> None:
    """Print an error as one paragraph on stderr."""
    stderr().print(Text.assemble(("error: ", "bold red"), message))


def print_hint(message: str) -> None:
    """Print a hint on stderr, so that a pipe gets only the result."""
    stderr().print(Text(message, style="dim"))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout."""
    console = stdout()
    for line in lines:
        console.print(Text(line))


def building(directory: object, *, plugin: bool = True) -> str:
    """Python code that rebuilds the model of a timm directory in a new interpreter.

    Args:
        directory: the timm directory.
        plugin: whether the model needs attnsurgery.
    """
    imported = "attnsurgery, timm" if plugin else "timm"
    return f"import {imported}; timm.create_model({f'local-dir:{directory}'!r}, pretrained=True)"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", words: int = 1) -> None:
    """Print a table on stdout.

    Args:
        columns: their headings.
        rows: cells of each row.
        title: above the table.
        words: number of leading columns that hold text and are left-aligned; numbers are right-aligned.
    """
    grid = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index < words else "right", no_wrap=not stdout().is_terminal)
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    stdout().print(grid)


@contextmanager
def busy(description: str) -> Iterator[None]:
    """Show a spinner on stderr within the context, if stderr is a terminal."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(description):
        yield


@contextmanager
def progress(description: str, seconds: float) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, if that is a terminal.

    Args:
        description: beside the bar.
        seconds: duration that the bar stands for.

    Yields:
        A function to be called with the number of finished items.
    """
    console = stderr()
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=seconds, count=0)
        yield lambda count: bar.update(task, completed=min(seconds, time.monotonic() - began), count=count)


def shown_sites(anatomy: Anatomy, everything: bool) -> list[Site]:
    """The sites that `inspect` shows."""
    return [site for site in anatomy.sites if everything or site.role in _ROLE_STYLE]


def print_anatomy(
    anatomy: Anatomy, everything: bool, block: str | None = None, prices: Mapping[str, Priced] | None = None
) -> None:
    """Print a tree of stages, their blocks and the sites in each block.

    Args:
        anatomy: of the model.
        everything: also show sites inside blocks.
        block: a block whose costs are shown at each site.
        prices: its costs by the site's address, or the reason why it cannot be there.
    """
    shown = shown_sites(anatomy, everything)
    width = max((len(site.address) + _STEP * (site.role != "block") for site in shown), default=0)
    role = max((len(site.role) for site in shown), default=0)
    root = Tree(Text(f"{anatomy.name}  input {_times(anatomy.input_size)}", style="bold"))
    for stage in sorted({site.stage for site in shown}, key=lambda stage: (stage is None, stage or 0)):
        branch = root.add(Text("outside the stages" if stage is None else f"stage {stage}"))
        _add_sites(branch, [site for site in shown if site.stage == stage], width, role, _columns(prices or {}))
    console = stdout()
    console.print(root)
    hidden = len(anatomy.sites) - len(shown)
    more = f", and {hidden} inside blocks: --all shows them" if hidden else ""
    console.print(Text(f"{len(shown)} sites{more}", style="dim"))
    own = [anatomy.own_attention(site) for stage in anatomy.stages for site in anatomy.attentions(stage)]
    if own:
        kinds = ", ".join(dict.fromkeys(attention.kind for attention in own))
        modules = _counted(len(own), "attention module")
        text = f"{modules} of its own ({kinds}), whose place a block can take: 'stage:* attention' with replace: true"
        console.print(Text(text, style="dim"))
    if block is not None:
        _print_sums(block, shown, prices or {})


def _columns(prices: Mapping[str, Priced]) -> dict[str, str]:
    """The costs at the end of each site's line, by address."""
    costs = [priced for priced in prices.values() if not isinstance(priced, str)]
    params = max((len(f"{cost.params:,}") for cost in costs), default=0)
    macs = max((len(f"{cost.macs:,}") for cost in costs), default=0)
    attention = max((len(f"{cost.attention_bytes:,}") for cost in costs), default=0)
    return {
        address: "  cannot stand here"
        if isinstance(priced, str)
        else f"  {priced.params:>{params},} parameters  {priced.macs:>{macs},} multiply-accumulates"
        f"  {priced.attention_bytes:>{attention},} bytes of attention"
        for address, priced in prices.items()
    }


def _print_sums(block: str, shown: Sequence[Site], prices: Mapping[str, Priced]) -> None:
    """Print the total costs of blocks at all sites of a role, and why sites are excluded."""
    lines = ["", f"costs     of one {block} at a site, for one image; attention is in fp32 and as if written out"]
    for role in dict.fromkeys(site.role for site in shown):
        role_prices = [prices[site.address] for site in shown if site.role == role]
        costs = [priced for priced in role_prices if not isinstance(priced, str)]
        if not costs:
            continue
        params, macs = sum(cost.params for cost in costs), sum(cost.macs for cost in costs)
        attention = sum(cost.attention_bytes for cost in costs)
        lines.append(
            f"together  at {_counted(len(costs), f'{role} site')}: {params:,} parameters, "
            f"{macs:,} multiply-accumulates, {attention:,} bytes of attention"
        )
    refused = {address: priced for address, priced in prices.items() if isinstance(priced, str)}
    for address, reason in list(refused.items())[:1]:
        lines.append(f"cannot    at {_counted(len(refused), 'site')}; at {address!r}: {reason} All reasons: --json")
    print_lines(lines)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _add_sites(branch: Tree, sites: Sequence[Site], width: int, role: int, ends: Mapping[str, str]) -> None:
    """Add each site below its block, in order of execution."""
    nodes: dict[str, Tree] = {}
    blocks = {site.address: site for site in sites if site.role == "block"}
    for site in sites:
        home = site.address
        while home and home not in blocks:
            home = home[: max(home.rfind("."), home.rfind(":"), 0)]
        if home and home not in nodes:
            nodes[home] = branch.add(_site(blocks[home], width, role, ends))
        if site.address not in blocks:
            nodes.get(home, branch).add(_site(site, width - _STEP * bool(home), role, ends))


def _site(site: Site, width: int, role: int, ends: Mapping[str, str]) -> Text:
    shape = f"{_times(site.shape):>14} {site.layout}"
    end = ends.get(site.address, "")
    return Text(f"{site.address:<{width}}  {site.role:<{role}} {shape}{end}", style=_ROLE_STYLE.get(site.role, "dim"))


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def print_plan(plan: Plan) -> None:
    """Each block of a recipe at its place, with what it costs, and all of them against the base."""
    from attnsurgery.catalog import NO_BLOCK

    size = _times(plan.input_size)
    blocks = _counted(sum(planned.block != NO_BLOCK for planned in plan.blocks), "block")
    taken_out = _counted(sum(bool(planned.replaces) for planned in plan.blocks), "attention module")
    out = f", {taken_out} out of it" if any(planned.replaces for planned in plan.blocks) else ""
    print_lines([f"{plan.name}: {blocks} into {plan.base}{out}, images of {size}", ""])
    print_table(
        ["site", "block", "options", "shape", "parameters", "multiply-accumulates", "bytes of attention"],
        [
            (
                planned.address,
                f"{planned.block} for {planned.replaces}" if planned.replaces else planned.block,
                _options(planned),
                _times(planned.shape),
                f"{planned.cost.params:,}",
                f"{planned.cost.macs:,}",
                f"{planned.cost.attention_bytes:,}",
            )
            for planned in plan.blocks
        ],
        words=3,
    )
    print_lines([""])
    params, macs = plan.params_before, plan.macs_before
    print_table(
        ["", "base", "operated", "added"],
        [
            _change("parameters", params, params + plan.params_added),
            _change("multiply-accumulates", macs, macs + plan.macs_added),
        ],
    )
    limit = plan.max_attention_mb
    within = "the recipe sets no limit" if limit is None else f"within the recipe's {limit * 1e6:,.0f}"
    print_lines(
        [
            "",
            f"attention  {plan.attention_bytes:,} bytes if written out, one image in fp32, all blocks; {within}",
        ]
    )


def _options(planned: PlannedBlock) -> str:
    """The options that differ from the block's defaults, and the values that 'auto' stands for."""
    options = {**planned.chosen, **planned.settled}
    return ", ".join(f"{key}={value}" + " (auto)" * (key in planned.settled) for key, value in options.items())


def print_report(report: Report) -> None:
    """Print what surgery changed, and the checks of the result."""
    print_table(
        ["", "base", "operated", "added"],
        [
            _change("parameters", report.params_before, report.params_after),
            _change("multiply-accumulates", report.macs_before, report.macs_after),
        ],
    )
    if report.blocks:
        print_lines([""])
        print_table(
            ["block", "kind", "parameters", "calls"],
            [(block.path, block.block, f"{block.params:,}", block.calls) for block in report.blocks],
        )
    print_lines([""])
    same = "equal" if report.max_abs_diff == 0 else f"different by up to {report.max_abs_diff:.3g}"
    if report.replaced:
        same += f" to those of the base without its {', '.join(report.replaced[:2])}"
        same += f" and {len(report.replaced) - 2} more" * (len(report.replaced) > 2)
    lost_keys = f"{len(report.keys_missing)} of the base lost" if report.keys_missing else "none of the base lost"
    print_lines(
        [
            f"outputs    {same}, on random images of {_times(report.input_size)}",
            f"keys       {len(report.keys_added)} added, {lost_keys}",
            f"attention  {report.attention_bytes:,} bytes if written out, one image in fp32",
        ]
    )
    if inside := [block.path for block in report.blocks if block.reaches == "features"]:
        print_lines([f"reaches    forward_features only, the head does not use it: {', '.join(inside)}"])


def _change(quantity: str, before: int, after: int) -> tuple[str, ...]:
    share = f" ({(after - before) / before:+.1%})" if before else ""
    return quantity, f"{before:,}", f"{after:,}", f"{after - before:+,}{share}"


def print_latencies(rows: Sequence[tuple[str, Latency]], conditions: str) -> None:
    """Print latencies that were measured together, with their conditions."""
    print_table(
        ["model", "p50 ms", "p90 ms", "noise", "runs"],
        [
            (name, f"{result.p50_ms:.3f}", f"{result.p90_ms:.3f}", f"{result.noise:.2%}", f"{result.runs:,}")
            for name, result in rows
        ],
    )
    versions = ", ".join(f"{key} {value}" for key, value in rows[0][1].versions.items())
    print_lines([f"conditions  {conditions}", f"on          {versions}"])
    first = rows[0][1]
    if not first.steady:
        print_hint(
            f"the machine was not steady: {first.left_out:.0%} of the rounds were left out, and the time changed by "
            f"{first.drift:+.1%} from beginning to end. Close what else runs, or let it cool down, and measure again."
        )


def print_singles(result: Latency, singles: Singles) -> None:
    """Print the latency of single calls, throughput, and the gain of a CUDA graph."""
    lines = [
        f"one by one  p50 {singles.p50_ms:.3f} ms, p90 {singles.p90_ms:.3f} ms, p99 {singles.p99_ms:.3f} ms of "
        f"{singles.calls:,} calls, each waited for",
        f"throughput  {result.images_per_second:,.1f} images a second",
    ]
    print_lines([*lines, *([f"beside it   {result.details()}"] if result.details() else [])])


def print_self_test(model: str, result: SelfTest, conditions: str, versions: Mapping[str, str]) -> None:
    """Print the result of comparing a model with itself."""
    count = len(result.ratios)
    verdict = "the intervals can be trusted" if result.passed else "the intervals are TOO NARROW on this machine"
    print_lines(
        [
            f"{model} against itself: {result.held} of {count} 95 % confidence intervals of the ratio contain 1.0 "
            f"(nominal coverage 95 %): {verdict}",
            f"half an interval is {result.half_width:.2%} of the time; the largest difference is {result.worst:.2%}",
            f"conditions  {conditions}",
            f"on          {', '.join(f'{key} {value}' for key, value in versions.items())}",
        ]
    )
    if result.unsteady:
        print_hint(f"the machine was not steady in {result.unsteady} of {count} comparisons.")


def print_comparison(base: str, variant: str, comparison: Comparison, conditions: str) -> None:
    print_latencies([(base, comparison.base), (variant, comparison.variant)], conditions)
    low, high = comparison.ratio_low, comparison.ratio_high
    sure = "" if low > 1 or high < 1 else ": no significant difference"
    print_lines([f"ratio       {comparison.ratio:.4f}, 95 % between {low:.4f} and {high:.4f}{sure}"])
