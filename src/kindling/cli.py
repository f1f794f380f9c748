"""The command line: `kindling featurize | fit | preflight | evaluate | predict | summary | convert | transfer | demo`.

A thin skin: each command calls the verbs of the library by their public names and shows what they return. The options
are in `options.py`, how results, errors and exit codes come out in `console.py`, the whole job of `transfer` in
`transfer.py`, the demo in `demo.py`. Importing this module imports neither torch nor Spark, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kindling as kd
from kindling import options as o
from kindling.console import FAILED, INTERRUPTED, OK, Clock, command, plain, say

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

app = typer.Typer(
    name="kindling",
    help="Deep learning on Apache Spark: photos and tables in, PyTorch models out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 an error that was shown, 2 a wrong command line, 130 interrupted. "
    "Each command has examples: `kindling COMMAND --help`.",
)

_sessions: list[Any] = []


def main() -> None:
    """Run the command line and end the process."""
    try:
        app()
    except KeyboardInterrupt:  # before or after a command's own handling
        sys.exit(INTERRUPTED)
    finally:
        for session in _sessions:
            session.stop()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kindling {kd.__version__}")
        raise typer.Exit(OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


def _spark(master: str | None, remote: str | None, log: str) -> SparkSession:
    if master is not None and remote is not None:
        raise typer.BadParameter("give --master or --remote, not both")
    from pyspark.sql import SparkSession

    # A failed task would fill the screen with Java stack traces before kindling says in one line what went wrong. The
    # log of a session that runs already, or of a server elsewhere, is not ours to set.
    ours = SparkSession.getActiveSession() is None and (remote is None or remote.startswith("local"))
    session = kd.spark(master, remote, conf={"spark.log.level": log.upper()} if ours else None)
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)  # Spark's own handler calls Java amid a call that waits for Java
    _sessions.append(session)
    return session


def _interrupt(*_: object) -> None:
    logging.disable(logging.CRITICAL)  # py4j logs a traceback of the call that is broken off
    raise KeyboardInterrupt


_OF_A_CALL = ("run", "resume", "overwrite", "master", "remote", "spark_log", "as_json")
"""Options of `fit` that say where and how it runs this time, not what run it is."""


def _as_started(context: typer.Context, run: str) -> dict[str, Any]:
    """All options of the command that started a run; those given now count instead of its own.

    Raises: ConfigError, when there is no run, or it was not started by a command.
    """
    session = None
    if "://" in run:
        session = _spark(context.params["master"], context.params["remote"], context.params["spark_log"])
    about = kd.Run.open(run, spark=session).asked.get("about") or {}
    started = about.get("command")
    if started is None:
        raise kd.errors.ConfigError(
            "resume", run, "was not started by `kindling fit`", "Go on with Model.fit(run=...), as it was started"
        )
    given = _given(context)
    again = {n: started.get(n, value) if n not in given else value for n, value in context.params.items()}
    context.params.update(again, run=run, resume=None)
    context.meta[_GIVEN] = given | set(about.get("given", ()))
    return dict(context.params)


_GIVEN = "kindling.given"


def _given(context: typer.Context) -> set[str]:
    """Options that stand on the command line, or stood there when the run was started."""
    if _GIVEN in context.meta:
        return set(context.meta[_GIVEN])
    return {n for n in context.params if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}


_SAID_BY_SOLVER = ("epochs", "batch_size", "accumulate", "strategy", "max_steps", "seed")
_FIELDS_OF_SOLVER = {"lr": "base_lr", "momentum": "momentum", "weight_decay": "weight_decay"}


def _as_solver_says(
    context: typer.Context, recipe: kd.Recipe, options: dict[str, Any]
) -> tuple[kd.Recipe, dict[str, Any]]:
    """The recipe and the options of its fit: what was given counts, and the solver for all that was not."""
    given = _given(context)
    kept = {name: value for name, value in options.items() if name not in _SAID_BY_SOLVER or name in given}
    del kept["optimizer"]
    if "epochs" in given:
        kept.setdefault("max_steps", None)
    changed = {field: context.params[name] for name, field in _FIELDS_OF_SOLVER.items() if name in given}
    return dataclasses.replace(recipe, solver=dataclasses.replace(recipe.solver, **changed)), kept


def _refuse_to_replace(out: str, overwrite: bool) -> None:
    """Say at once what saving would say after hours of training."""
    place = Path(out)
    if not overwrite and place.is_dir() and any(place.iterdir()):
        raise kd.errors.StorageError(f"{out} is there already. Add --overwrite to replace it, or choose another --out.")


def _labelled(net: kd.Model, labels: tuple[str, ...] | None, seed: int) -> kd.Model:
    """A net without labels gets those of the data, and a last layer of the right width if it needs one.

    Raises: ModelError, when the net does not end in a Linear layer.
    """
    if net.labels is not None or labels is None:
        return net
    ((output, spec),) = net.signature.outputs.items()
    if spec.shape[-1] == len(labels):
        return net.with_labels(labels)
    from torch import nn

    from kindling.transfer import seeded

    last = dict(net.module.named_modules()).get(output)
    if not isinstance(last, nn.Linear):
        raise kd.errors.ModelError(
            f"the net gives {spec.shape[1:]} scores and the data has {len(labels)} labels. "
            "Use `kindling transfer`, or --model module:function with a net made for these labels."
        )
    say(f"new last layer {output!r}: {len(labels)} labels")
    with seeded(seed):
        return net.replace_layer(output, nn.Linear(last.in_features, len(labels))).with_labels(labels)


def _keep_report(report: kd.Report, file: Path | None, plot: Path | None, data: dict[str, Any]) -> None:
    """Write `data`, which holds the report as JSON values, and the picture of it, where they are wanted."""
    for path in (file, plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if file is not None:
        file.write_text(json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        say(f"report in {file}")
    if plot is not None:
        report.plot(plot)
        say(f"confusion matrix in {plot}")


@app.command(
    epilog="**Example**: `kindling featurize photos/ --model vgg16 --weights vgg16.safetensors --until fc2 "
    "--out features.parquet`"
)
def featurize(
    data: o.Data,
    model: o.ModelName,
    out: Annotated[
        str, o.option(o.OUTPUT, "Parquet to write; what is there already is not computed again.", metavar="FOLDER")
    ],
    weights: o.Weights = None,
    until: o.Until = None,
    on_error: o.OnError = "keep",
    precision: o.Precision = "auto",
    batch_size: o.ForwardBatch = None,
    classes: o.Classes = None,
    master: o.Master = None,
    remote: o.Remote = None,
    spark_log: o.SparkLog = "OFF",
    as_json: o.Json = False,
) -> None:
    """Run a net over photos and keep what one of its layers says, as Parquet (path, label, features)."""
    with command(as_json=as_json) as output:
        clock = Clock()
        with clock.phase("start Spark"):
            spark = _spark(master, remote, spark_log)
        with clock.phase("load the model"):
            net = o.open_model(model, weights, classes=classes, spark=spark)
            net = net.until(*until) if until else net
        with clock.phase("featurise"):
            photos = o.rows_of(spark, data)
            frame = net.featurize(photos, out=out, on_error=on_error, precision=precision, batch_size=batch_size)
            about = kd.provenance(out, spark=spark)
        result = {key: about[key] for key in ("rows", "broken", "examples", "precision")}
        where = {"keep": " (see column error)", "drop": " left out"}.get(on_error, "")
        output.result(
            {"out": out, **result, "columns": frame.columns, "seconds": clock.to_json()},
            f"{about['rows']} rows in {out}" + (f", {about['broken']} broken ones{where}" if about["broken"] else ""),
        )


@app.command(
    epilog="**Examples**: `kindling fit digits/ --model my_nets:small --out model --epochs 10`, where my_nets.py holds "
    "`def small(labels): return kd.Model.of(net, ..., labels=labels)`; "
    "`kindling fit more-photos/ --model model --out model2 --lr 0.001` trains a saved model further; "
    "`kindling fit --resume runs/1` goes on where a run with `--run runs/1` was broken off; "
    "`kindling fit digits.parquet --solver lenet_solver.prototxt --input-shape 1,28,28 --out model` trains as "
    "Caffe would."
)
def fit(
    context: typer.Context,
    data: o.TrainingData = None,
    model: o.TrainedName = None,
    out: Annotated[str | None, o.option(o.OUTPUT, "Where to save the trained model.", metavar="FOLDER")] = None,
    weights: o.Weights = None,
    validation: Annotated[
        list[str] | None,
        o.option(o.TRAINING, "Rows to validate on after each epoch. May be repeated.", metavar="DATA"),
    ] = None,
    freeze: o.Freeze = None,
    solver: Annotated[
        str | None,
        o.option(
            o.TRAINING,
            "A solver.prototxt of Caffe: its net (instead of --model), trained as it says. Training options given "
            "beside it count instead of its own.",
            metavar="FILE",
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        o.option(o.NET, "Shape of one row, where the solver's net leaves it open.", metavar="3,32,32"),
    ] = None,
    mean: Annotated[
        str | None,
        o.option(o.NET, "The mean file that the solver's net names and that is not beside it.", metavar="FILE"),
    ] = None,
    resize_to: Annotated[
        int | None,
        o.option(o.NET, "Shorter side of pictures before the solver's net cuts them, where no mean file says it."),
    ] = None,
    target: Annotated[str, o.option(o.TRAINING, "The column to learn.", metavar="COLUMN")] = "label",
    epochs: o.Epochs = 10,
    batch_size: o.BatchSize = 32,
    lr: o.Rate = 0.01,
    momentum: o.Momentum = 0.9,
    weight_decay: o.WeightDecay = 0.0,
    strategy: o.StrategyName = "averaging:5",
    accumulate: o.Accumulate = 1,
    clip_norm: o.ClipNorm = None,
    precision: o.TrainPrecision = "fp32",
    warmup_steps: o.WarmUp = 0,
    ema_decay: o.Ema = None,
    patience: o.Patience = None,
    max_steps: o.MaxSteps = None,
    max_minutes: o.MaxMinutes = None,
    workers: o.Workers = None,
    timeout: Annotated[
        float,
        o.option(o.TRAINING, "Seconds without progress after which a worker is given up and all start again.", min=2),
    ] = 600.0,
    seed: o.Seed = 0,
    run: Annotated[
        str | None,
        o.option(
            o.TRAINING,
            "Run directory for events, checkpoints, the model. A run of the same command that is there goes on.",
            metavar="FOLDER",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        o.option(
            o.TRAINING,
            "Go on with the run in this directory, as it was started; options given beside count instead of its own.",
            metavar="RUN",
        ),
    ] = None,
    on_error: o.OnError = "fail",
    overwrite: o.Overwrite = False,
    classes: o.Classes = None,
    master: o.Master = None,
    remote: o.Remote = None,
    spark_log: o.SparkLog = "OFF",
    as_json: o.Json = False,
) -> None:
    """Train a model on Spark and save it."""
    if resume is not None:
        with command(as_json=as_json):
            again = _as_started(context, resume)
        fit(context, **again)
        return
    with command(as_json=as_json) as output:
        if not data or (model is None and solver is None) or out is None:
            raise typer.BadParameter(
                "DATA, --model and --out are needed (or --solver for --model), or --resume with a run that knows them"
            )
        if model is not None and solver is not None:
            raise typer.BadParameter("a solver brings its own net: give --model or --solver, not both")
        if solver is not None and not Path(solver).is_file():
            raise typer.BadParameter(f"there is no file {solver}", param_hint="--solver")
        if solver is None and (input_shape, mean, resize_to) != (None, None, None):
            raise typer.BadParameter("only for the net of a --solver: --input-shape, --mean, --resize-to")
        agree = o.strategy_of(strategy)
        _refuse_to_replace(out, overwrite)
        clock = Clock()
        with clock.phase("start Spark"):
            spark = _spark(master, remote, spark_log)
        with clock.phase("read"):
            rows = o.rows_of(spark, data)
            labels = kd.labels(rows, target) if target in rows.columns else None
            recipe = None
            if solver is not None:
                shape = None if input_shape is None else _shape(input_shape)
                recipe = kd.caffe_recipe(
                    solver,
                    labels=labels,
                    weights=weights,
                    input_shape=shape,
                    mean=mean,
                    image=None if resize_to is None else {"resize_to": resize_to},
                    seed=seed if "seed" in _given(context) else None,
                )
                for note in recipe.notes:
                    say(note)
                net = recipe.model
            else:
                assert model is not None
                net = o.open_model(model, weights, labels=labels, classes=classes, seed=seed, spark=spark)
            net = _labelled(net, labels, seed)
            net = net.freeze(until=freeze) if freeze else net
            net.save(out, overwrite=overwrite, dry_run=True)  # what can fail after the training fails before it
        with clock.phase("train"):
            options = {
                "epochs": epochs,
                "batch_size": batch_size,
                "accumulate": accumulate,
                "clip_norm": clip_norm,
                "precision": precision,
                "warmup_steps": warmup_steps,
                "ema_decay": ema_decay,
                "early_stopping": kd.EarlyStopping(patience=patience) if patience is not None else None,
                "max_steps": max_steps,
                "max_seconds": 60 * max_minutes if max_minutes is not None else None,
                "optimizer": o.sgd(lr, momentum, weight_decay),
                "strategy": agree,
                "validation": o.rows_of(spark, validation) if validation else None,
                "workers": workers,
                "timeout_s": timeout,
                "seed": seed,
                "run": run,
                "about": {
                    "command": {name: value for name, value in context.params.items() if name not in _OF_A_CALL},
                    "given": sorted(_given(context)),
                },
                "target": target,
                "on_error": on_error,
            }
            if recipe is None:
                net = net.fit(rows, **options)
            else:
                recipe, options = _as_solver_says(context, dataclasses.replace(recipe, model=net), options)
                net = recipe.fit(rows, **options)
        with clock.phase("save"):
            net.save(out, overwrite=overwrite)
        output.result(
            {"model": out, "history": net.history[-1], "seconds": clock.to_json()}, f"{clock}\nmodel in {out}"
        )


@app.command(epilog="**Example**: `kindling preflight digits/ --model lenet --workers 4 --run hdfs:///runs/digits`")
def preflight(
    data: o.Data,
    model: o.ModelName,
    weights: o.Weights = None,
    validation: Annotated[
        list[str] | None,
        o.option(o.TRAINING, "Rows to validate on after each epoch. May be repeated.", metavar="DATA"),
    ] = None,
    freeze: o.Freeze = None,
    target: Annotated[str, o.option(o.TRAINING, "The column to learn.", metavar="COLUMN")] = "label",
    batch_size: o.BatchSize = 32,
    workers: o.Workers = None,
    run: Annotated[str | None, o.option(o.TRAINING, "The run directory to be.", metavar="FOLDER")] = None,
    classes: o.Classes = None,
    master: o.Master = None,
    remote: o.Remote = None,
    spark_log: o.SparkLog = "OFF",
    as_json: o.Json = False,
) -> None:
    """Look, in seconds, whether a training can work: data, net, slots, executors, memory. Trains nothing."""
    with command(as_json=as_json) as output:
        spark = _spark(master, remote, spark_log)
        rows = o.rows_of(spark, data)
        labels = kd.labels(rows, target) if target in rows.columns else None
        net = o.open_model(model, weights, labels=labels, classes=classes, spark=spark)
        net = _labelled(net, labels, 0)
        net = net.freeze(until=freeze) if freeze else net
        checks = net.preflight(
            rows,
            batch_size=batch_size,
            validation=o.rows_of(spark, validation) if validation else None,
            workers=workers,
            run=run,
            target=target,
        )
        output.result(checks.to_json(), str(checks))
        if not checks:
            raise SystemExit(FAILED)


@app.command(
    epilog="**Example**: `kindling evaluate test-photos/ --model model --report report.json --plot confusion.png`"
)
def evaluate(
    data: o.Data,
    model: o.ModelName,
    weights: o.Weights = None,
    precision: o.Precision = "fp32",
    batch_size: o.ForwardBatch = None,
    report: o.ReportFile = None,
    plot: o.PlotFile = None,
    classes: o.Classes = None,
    master: o.Master = None,
    remote: o.Remote = None,
    spark_log: o.SparkLog = "OFF",
    as_json: o.Json = False,
) -> None:
    """Compare a model's answers with the labels: loss, accuracy, precision, recall, F1, top-5, confusion matrix."""
    with command(as_json=as_json) as output:
        spark = _spark(master, remote, spark_log)
        net = o.open_model(model, weights, classes=classes, spark=spark)
        found = net.evaluate(o.rows_of(spark, data), precision=precision, batch_size=batch_size)
        result = {"report": found.to_json()}
        _keep_report(found, report, plot, result)
        output.result(result, str(found))


@app.command(
    epilog="**Examples**: `kindling predict cat.jpg dog.jpg --model model` (image files here: no Spark is started); "
    "`kindling predict hdfs:///new --model model --out answers.parquet`"
)
def predict(
    data: o.Data,
    model: o.ModelName,
    weights: o.Weights = None,
    out: Annotated[
        str | None, o.option(o.OUTPUT, "Parquet to write instead of showing rows.", metavar="FOLDER")
    ] = None,
    top_k: Annotated[int, o.option(o.OUTPUT, "Best classes given for each row.", min=1)] = 5,
    limit: Annotated[int, o.option(o.OUTPUT, "Rows shown where there is no --out.", min=1)] = 20,
    on_error: o.OnError = "keep",
    precision: o.Precision = "fp32",
    overwrite: o.Overwrite = False,
    classes: o.Classes = None,
    master: o.Master = None,
    remote: o.Remote = None,
    spark_log: o.SparkLog = "OFF",
    as_json: o.Json = False,
) -> None:
    """Classify photos: the best label, its probability, and the runners-up."""
    with command(as_json=as_json) as output:
        if (out, master, remote) == (None, None, None) and all(Path(name).is_file() for name in data):
            net = o.open_model(model, weights, classes=classes)
            found = net.predict(data, top_k=top_k, on_error="fail" if on_error == "fail" else "keep")
            answers = [{"path": path, **row} for path, row in zip(data, found, strict=True)]
            output.result({"predictions": answers}, _table(answers))
            return
        if out is not None:
            _refuse_to_replace(out, overwrite)
        spark = _spark(master, remote, spark_log)
        net = o.open_model(model, weights, classes=classes, spark=spark)
        frame = net.predict(o.rows_of(spark, data), top_k=top_k, on_error=on_error, precision=precision)
        if out is None:
            answers = [row.asDict(recursive=True) for row in frame.limit(limit).collect()]
            output.result({"predictions": answers}, _table(answers))
        else:
            frame.write.mode("overwrite" if overwrite else "error").parquet(out)
            rows = spark.read.parquet(out).count()
            output.result({"out": out, "rows": rows}, f"{rows} rows in {out}")


def _table(answers: list[dict[str, Any]]) -> str:
    """One line for each row: the answer, its probability, the path, the runners-up."""
    lines = []
    for answer in answers:
        if answer.get("error"):
            lines.append(f"{'?':<24} {'':>5}  {answer.get('path', '')}  ({answer['error']})")
            continue
        if answer.get("top_k") is None:  # no labels: numbers
            lines.append(f"{plain(answer['prediction'])}  {answer.get('path', '')}")
            continue
        others = ", ".join(f"{other['label']} {other['probability']:.3f}" for other in answer["top_k"][1:])
        line = f"{answer['prediction']:<24} {answer['probability']:.3f}  {answer.get('path', '')}"
        lines.append(f"{line}  (then {others})" if others else line)
    return "\n".join(lines) or "no rows"


@app.command(epilog="**Examples**: `kindling summary vgg16 --until fc2`; `kindling summary model --plot model.svg`")
def summary(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A shipped net, the folder of a saved model, or module:function.",
            show_default=False,
        ),
    ],
    weights: o.Weights = None,
    until: o.Until = None,
    freeze: o.Freeze = None,
    plot: Annotated[Path | None, o.option(o.OUTPUT, "Draw the net (SVG, PNG).", metavar="FILE")] = None,
    classes: o.Classes = None,
    as_json: o.Json = False,
) -> None:
    """Show a net's layers, sizes and parameters. Starts no Spark."""
    with command(as_json=as_json) as output:
        net = o.open_model(model, weights, classes=classes)
        net = net.until(*until) if until else net
        net = net.freeze(until=freeze) if freeze else net
        table = net.summary()
        if plot is not None:
            net.plot(plot)
            say(f"picture in {plot}")
        output.result(table.to_json(), str(table))


@app.command(
    epilog="**Example**: `kindling transfer hdfs:///caltech256 --net vgg16 --weights vgg16.safetensors --until fc2 "
    "--out hdfs:///models/caltech256 --report report.json --plot confusion.png`"
)
def transfer(
    data: o.Data,
    model: o.ModelName,
    out: Annotated[
        str, o.option(o.OUTPUT, "Where to save the model: net, head, preparation and labels.", metavar="FOLDER")
    ],
    weights: o.Weights = None,
    until: o.Until = None,
    split: o.Shares = ".7,.15,.15",
    epochs: o.Epochs = 20,
    batch_size: o.BatchSize = 32,
    lr: o.Rate = 0.01,
    momentum: o.Momentum = 0.9,
    weight_decay: o.WeightDecay = 0.0,
    strategy: o.StrategyName = "averaging:5",
    workers: o.Workers = None,
    seed: o.Seed = 0,
    precision: o.Precision = "auto",
    features: Annotated[
        str | None,
        o.option(o.OUTPUT, "Keep the features here as Parquet: a second run computes only new ones.", metavar="FOLDER"),
    ] = None,
    report: o.ReportFile = None,
    plot: o.PlotFile = None,
    overwrite: o.Overwrite = False,
    classes: o.Classes = None,
    master: o.Master = None,
    remote: o.Remote = None,
    spark_log: o.SparkLog = "OFF",
    as_json: o.Json = False,
) -> None:
    """The whole job: photos in; features of a trained net, a new head trained on Spark, a report and a model out."""
    with command(as_json=as_json) as output:
        agree, shares = o.strategy_of(strategy), o.shares_of(split)
        _refuse_to_replace(out, overwrite)
        from kindling.transfer import transfer as run

        clock = Clock()
        with clock.phase("start Spark"):
            spark = _spark(master, remote, spark_log)
        with clock.phase("load the net"):
            net = o.open_model(model, weights, classes=classes, seed=seed, spark=spark)
            net = net.until(*until) if until else net
            net.save(out, overwrite=overwrite, dry_run=True)  # what can fail after the training fails before it
        done = run(
            o.rows_of(spark, data),
            net,
            shares=shares,
            features=features,
            precision=precision,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=o.sgd(lr, momentum, weight_decay),
            strategy=agree,
            workers=workers,
            seed=seed,
            clock=clock,
        )
        with clock.phase("save"):
            done.model.save(out, overwrite=overwrite)
        result = {"model": out, "seconds": clock.to_json(), **done.to_json()}
        _keep_report(done.test, report, plot, result)
        output.result(result, f"{done.test}\n\n{done}\n\n{clock}\nmodel in {out}")


@app.command(
    epilog="**Examples**: `kindling convert squeezenet.prototxt squeezenet.onnx --weights squeezenet.caffemodel`; "
    "`kindling convert net.onnx model` (a model of kindling); `kindling convert model alone --stand-alone`"
)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FROM",
            help="A saved model, a shipped net, module:function, or a file of another system.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TO",
            help="Ends in .onnx, .pt2 or .safetensors; anything else is the folder of a model of kindling.",
            show_default=False,
        ),
    ],
    weights: o.Weights = None,
    until: o.Until = None,
    input_shape: Annotated[
        str | None,
        o.option(o.NET, "Shape of one row, where the file leaves it open.", metavar="3,224,224"),
    ] = None,
    stand_alone: Annotated[
        bool, o.option(o.OUTPUT, "Write a folder with a script that needs torch alone.", "--stand-alone")
    ] = False,
    preparation: Annotated[
        bool, o.option(o.OUTPUT, "Make normalising the input a part of the graph.", "--preparation/--no-preparation")
    ] = True,
    overwrite: o.Overwrite = False,
    classes: o.Classes = None,
    as_json: o.Json = False,
) -> None:
    """Turn a model of one system into a file of another. Starts no Spark."""
    with command(as_json=as_json) as output:
        shape = None if input_shape is None else _shape(input_shape)
        net = o.open_model(source, weights, classes=classes, input_shape=shape)
        net = net.until(*until) if until else net
        if stand_alone or Path(target).suffix in (".onnx", ".pt2", ".safetensors"):
            net.export(target, preparation=preparation, overwrite=overwrite)
        else:
            net.save(target, overwrite=overwrite)
        output.result({"out": target, "model": net.name}, f"{net.name} in {target}")


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--input-shape {text!r} is no list of whole numbers, such as 3,224,224") from None


@app.command(epilog="**Example**: `kindling demo --out demo-output`")
def demo(
    out: Annotated[Path, o.option(o.OUTPUT, "Where the pictures, features and models go.", metavar="FOLDER")] = Path(
        "demo-output"
    ),
    master: Annotated[str | None, o.option(o.WHERE, "Spark master; default: local[2].", metavar="URL")] = None,
    remote: o.Remote = None,
    spark_log: o.SparkLog = "OFF",
    as_json: o.Json = False,
) -> None:
    """Transfer learning from handwritten digits 0-4 to 5-9, offline, in under three minutes on two cores."""
    with command(as_json=as_json) as output:
        from kindling.demo import run

        spark = _spark(master or (None if remote else "local[2]"), remote, spark_log)
        result = run(spark, out)
        output.result(result.to_json(), str(result))
