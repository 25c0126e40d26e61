"""`amct-ext`: look at the files of a retraining job, and check its pruning."""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amct_ext._library import build_info
from amct_ext.checkpoint.amct_names import has_amct_names
from amct_ext.checkpoint.load import read_state_dict
from amct_ext.config.files import check_config
from amct_ext.errors import AmctError
from amct_ext.explain import targets
from amct_ext.flows.verify import compare_records
from amct_ext.record.text import read_record

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

ExistingFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)]


@app.command()
def info() -> None:
    """How the compiled operators were built and what they use on this machine."""
    for key, value in build_info().items():
        typer.echo(f"{key}: {value}")


@app.command("targets")
def list_targets() -> None:
    """Which device family gains from which method."""
    methods = ("int8_quantisation", "int4_quantisation", "channel_pruning", "sparsity_2to4")
    table = Table("family", "products", *(method.replace("_", " ") for method in methods))
    for target in targets.TARGETS:
        flags = ("yes" if getattr(target, method) else "no" for method in methods)
        table.add_row(target.name, ", ".join(target.products), *flags)
    Console().print(table)


@app.command()
def validate(
    config: ExistingFile,
    target: Annotated[str, typer.Option(help="also warn of methods that this device family gains nothing from")] = "",
) -> None:
    """Check a configuration file (text or JSON) for what can be checked without the model.

    A text without settings is refused, as by the create functions; create_quant_retrain_config alone takes it, for the
    defaults.
    """
    with _errors_reported():
        check_config(config)
        warnings = targets.check_target(config, target) if target else []
    for warning in warnings:
        typer.echo(_printable(f"warning: {warning}"))
    typer.echo(_printable(f"{config}: valid"))


@app.command()
def inspect(record: ExistingFile) -> None:
    """Show a record file: quantisation factors, removed channels, 2:4 masks."""
    with _errors_reported():
        content = read_record(str(record))
    console = Console()
    if content.quant:
        table = Table("layer", "types", "scale_d", "offset_d", "scale_w", "shifts", title="quantisation factors")
        for entry in content.quant:
            low, high = min(entry.scale_w), max(entry.scale_w)
            scales = f"{low:.4g}" if len(entry.scale_w) == 1 else f"{low:.4g} .. {high:.4g} ({len(entry.scale_w)})"
            shifts = f"{min(entry.shift_bit)} .. {max(entry.shift_bit)}" if entry.shift_bit else "-"
            types = f"{entry.act_type}/{entry.wts_type}"
            _add_row(table, entry.key, types, f"{entry.scale_d:.4g}", str(entry.offset_d), scales, shifts)
        console.print(table)
    if content.channel:
        table = Table("producers", "consumers", "channels", "removed", title="channel groups")
        for group in content.channel:
            first = group.producers[0]
            names = [", ".join(node.name for node in nodes) for nodes in (group.producers, group.consumers)]
            _add_row(table, *names, str(first.end - first.begin), str(len(first.prune_index)))
        console.print(table)
    if content.sparse:
        table = Table("layer", "shape", "mask", title="2:4 sparsity")
        for sparse in content.sparse:
            shape = " x ".join(map(str, sparse.mask_shape))
            _add_row(table, sparse.name, shape, "not made yet" if sparse.mask is None else "present")
        console.print(table)
    if not (content.quant or content.channel or content.sparse):
        typer.echo(_printable(f"{record}: empty (no factors, channel groups or masks yet)"))


@app.command()
def checkpoint(
    file: ExistingFile,
    state_dict_name: Annotated[str | None, typer.Option(help="the entry that holds the state dict")] = None,
) -> None:
    """Show whose names a checkpoint uses (ours or AMCT's) and what it holds; the file is never executed."""
    with _errors_reported():
        state = read_state_dict(str(file), state_dict_name)
    table = Table(
        "entry", "shape", "dtype", title=f"{'AMCT' if has_amct_names(state) else 'native'} names, {len(state)} tensors"
    )
    for key, value in state.items():
        shape, dtype = " x ".join(map(str, value.shape)) or "scalar", str(value.dtype).removeprefix("torch.")
        _add_row(table, key, shape, dtype)
    Console().print(table)


@app.command()
def verify(
    network: Annotated[str, typer.Argument(help="FILE.py:FUNCTION; the function returns (float model, input_data)")],
    record: ExistingFile,
    tolerance: Annotated[float, typer.Option(help="largest difference of outputs that passes, relative")] = 1e-5,
) -> None:
    """Check a record's channel pruning: compare the pruned network with the unpruned one without those channels.

    FILE.py is executed. Ends with status 1 where the outputs differ by more than the tolerance.
    """
    with _errors_reported():
        model, input_data = _function(network)()
        comparison = compare_records(model, read_record(str(record)).channel, input_data)[1]
    typer.echo(str(comparison))
    if not comparison.error <= tolerance:
        raise typer.Exit(1)


def _function(network: str) -> Callable[[], Any]:
    """What FILE.py:FUNCTION names. Errors: ValueError."""
    path, _, name = network.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"'{network}' must be FILE.py:FUNCTION; there is no file '{path}'")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise ValueError(f"{path} has no function '{name}'")
    return cast(Callable[[], Any], function)


@contextlib.contextmanager
def _errors_reported() -> Iterator[None]:
    """What is wrong with a file, or with reading it, ends the command with one message and status 1."""
    try:
        yield
    except (AmctError, ValueError, TypeError, OSError) as error:
        typer.echo(_printable(f"error: {error}"), err=True)
        raise typer.Exit(1) from error


def _add_row(table: Table, *cells: str) -> None:
    """Add cells as they are: names in a file may look like rich's markup."""
    table.add_row(*(Text(_printable(cell)) for cell in cells))


def _printable(text: str) -> str:
    """Text for a terminal: control characters and halves of surrogate pairs, which a file may hold, are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
