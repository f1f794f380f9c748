"""Model: the one noun. A torch module plus all it needs around it; every verb that changes it returns a new one.

The verbs are short doors to the rooms: `surgery` (until, freeze, then, replace), `predict` (featurize, predict,
evaluate), `train` (fit), `bundle` (save). Nothing here imports Spark; the rooms that need it are opened on use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError, FormatError, ModelError, did_you_mean
from kindling.prepare import ArrayStep, Augmentation, LabelStep, Preparation, SequenceStep, Step
from kindling.signature import Signature, TensorSpec

if TYPE_CHECKING:
    import torch
    from pyspark.resource import ResourceProfile
    from pyspark.sql import DataFrame, SparkSession
    from torch import nn

    from kindling.evaluate import Report
    from kindling.formats.models import Imported
    from kindling.predict.engine import Precision
    from kindling.surgery import Summary
    from kindling.train.callbacks import Callback
    from kindling.train.checklist import Checklist
    from kindling.train.figures import Metric
    from kindling.train.policy import Checkpoints
    from kindling.train.settings import EarlyStopping
    from kindling.train.strategies import Strategy
    from kindling.train.targets import Loss


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Model:
    """A torch module, its signature, its preparation and its labels. Immutable: treat the module as read-only too.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> model = Model.of(net, column="features", shape=(4,), labels=["setosa", "versicolor", "virginica"])
    >>> model
    Model 'Sequential': features (N, 4) float32 -> 2 (N, 3) float32; 3 labels; 67 parameters, none frozen
    >>> model.until("0").signature.outputs["0"].shape
    ('N', 8)
    """

    module: nn.Module
    signature: Signature
    preparation: Preparation
    labels: tuple[str, ...] | None = None
    """Class names in the order of the scores, where the model classifies."""
    frozen: frozenset[str] = frozenset()
    """Names of the layers that training leaves alone (no gradients, inference mode)."""
    name: str = "model"
    history: tuple[Mapping[str, Any], ...] = ()
    """One JSON object per finished training: settings, epochs, metrics."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights came from: file name, sha256, layout, licence."""

    # ------------------------------------------------------------------------------------------------- making one

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        column: str = "features",
        shape: Sequence[int] | None = None,
        inputs: Step | Sequence[Step] | None = None,
        labels: Iterable[str] | None = None,
        target: str = "label",
        name: str | None = None,
    ) -> Model:
        """Wrap any torch module.

        Args:
            module: takes one tensor per input, rows first, and returns one tensor (or a tuple or dict of them).
            column, shape: of the list column it reads and of one row's tensor, for nets that take plain numbers.
            inputs: preparation steps instead, in the order of the module's arguments, for photos and anything else.
            labels: class names in the order of the module's scores.
            target: the column that holds a row's true label.
            name: what to call it; the class's name if None.
        Raises: ConfigError, when neither `shape` nor `inputs` says what a row looks like; ModelError, when the module
            cannot take it.
        """
        from kindling import surgery

        if inputs is None:
            if shape is None:
                raise ConfigError("shape", shape, "leaves open what one row looks like", "Give shape=(4,), or inputs=")
            inputs = ArrayStep(column, column, tuple(shape))
        steps = (inputs,) if isinstance(inputs, Step) else tuple(inputs)
        specs = {step.name: _tensor_spec(step) for step in steps}
        signature = surgery.infer_output_shapes(module, Signature(specs, {}))
        names = None if labels is None else tuple(str(label) for label in labels)
        targets = () if names is None else (LabelStep("target", target, names),)
        return cls(
            module=module,
            signature=signature,
            preparation=Preparation(steps, targets),
            labels=names,
            name=name or type(module).__name__,
        )

    def __repr__(self) -> str:
        def side(specs: Mapping[str, TensorSpec]) -> str:
            return ", ".join(f"{name} ({', '.join(map(str, s.shape))}) {s.dtype}" for name, s in specs.items())

        count = sum(p.numel() for p in self.module.parameters())
        labels = f"{len(self.labels)} labels; " if self.labels else ""
        frozen = f"{len(self.frozen)} layers frozen" if self.frozen else "none frozen"
        return (
            f"Model {self.name!r}: {side(self.signature.inputs)} -> {side(self.signature.outputs)}; "
            f"{labels}{count:,} parameters, {frozen}"
        )

    # -------------------------------------------------------------------------------------------------- looking

    def summary(self) -> Summary:
        """The table of layers: name and type, sizes in and out, parameters, shapes, inputs; then the totals."""
        from kindling import surgery

        return surgery.summary(self.module, self.signature, self.frozen, self.labels)

    def plot(self, path: str | Path) -> Path:
        """Draw the net's graph as SVG or PNG (by the file's ending); returns the path."""
        from kindling import picture

        return picture.plot(self.module, self.signature, self.frozen, path)

    # -------------------------------------------------------------------------------------------------- surgery

    def until(self, *names: str) -> Model:
        """The net up to a layer: what it gives after its activation. Several names give several outputs.

        Layers that nothing needs any more are removed with their weights.
        Raises: ModelError, for a layer that is not there.
        """
        from kindling import surgery

        if not names:
            raise ConfigError(
                "names", names, "names no layer to end at", f"Name one or more, as in until('fc2').{self._layers()}"
            )
        module, signature = surgery.until(self.module, names, self.signature)
        kept = self.frozen & surgery.frozen_layers(module, None)
        # Inputs that only removed layers read are not asked of the DataFrame any more.
        inputs = tuple(step for step in self.preparation.inputs if step.name in signature.inputs)
        preparation = Preparation(inputs)
        return replace(self, module=module, signature=signature, labels=None, frozen=kept, preparation=preparation)

    def freeze(self, until: str | None = None) -> Model:
        """Leave layers alone in training: no gradients, dropout off, batch statistics fixed.

        Args:
            until: the last layer to freeze, with all that it is computed from; None freezes every layer.
        Raises: ModelError, for a layer that is not there.
        """
        from kindling import surgery

        return replace(self, frozen=self.frozen | surgery.frozen_layers(self.module, until, self.signature))

    def unfreeze(self) -> Model:
        """Let every layer learn again."""
        return replace(self, frozen=frozenset())

    def then(
        self,
        layers: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        *,
        labels: Iterable[str] | None = None,
        name: str | None = None,
        target: str = "label",
    ) -> Model:
        """Append layers behind the net's one output.

        Args:
            layers: a module, several in order, or a mapping from name to module.
            labels: class names in the order of the new scores; `kindling.labels(df)` finds them.
            name: of the one layer, where `layers` is one module.
            target: the column that holds a row's true label.
        Raises: ModelError, when the first layer cannot take what the net gives, or the labels do not fit the scores.
        """
        from kindling import surgery

        module, signature = surgery.then(self.module, self.signature, layers, name)
        names = None if labels is None else tuple(str(label) for label in labels)
        preparation = self._untargeted()
        if names is not None:
            (spec,) = signature.outputs.values()
            binary = len(names) == 2 and spec.shape[-1] == 1
            if spec.shape[-1] != len(names) and not binary:
                raise ModelError(f"the last layer gives {spec.shape[1:]} scores, but there are {len(names)} labels.")
            preparation = Preparation(preparation.inputs, (LabelStep("target", target, names),))
        return replace(self, module=module, signature=signature, labels=names, preparation=preparation)

    def replace_layer(self, name: str, layer: nn.Module) -> Model:
        """Put another layer in a layer's place; what comes after must take its output.

        Raises: ModelError, for a layer that is not there or does not fit.
        """
        from kindling import surgery

        module, signature = surgery.replace(self.module, self.signature, name, layer)
        changed = {n: s.shape for n, s in signature.outputs.items()} != {
            n: s.shape for n, s in self.signature.outputs.items()
        }
        return replace(
            self,
            module=module,
            signature=signature,
            frozen=self.frozen - {name},
            labels=None if changed else self.labels,
            preparation=self._untargeted() if changed else self.preparation,
        )

    def with_labels(self, labels: Iterable[str], *, target: str = "label") -> Model:
        """The same net with names for its scores, and `target` as the column that holds a row's true one."""
        names = tuple(str(label) for label in labels)
        return replace(
            self, labels=names, preparation=Preparation(self.preparation.inputs, (LabelStep("target", target, names),))
        )

    def _untargeted(self) -> Preparation:
        return Preparation(self.preparation.inputs)

    def _layers(self) -> str:
        from kindling import surgery

        return did_you_mean("", [layer.name for layer in surgery.layers(self.module, self.signature)])

    # ---------------------------------------------------------------------------------------------------- using

    def featurize(self, df: DataFrame, **options: Any) -> DataFrame:
        """Run the net over a DataFrame; see `kindling.predict.batch.featurize` for the options.

        Returns: path, label, features array<float>, error (one array column per output where there are several).
        """
        from kindling.predict import batch

        return batch.featurize(self, df, **options)

    def precision(self, df: DataFrame, precision: str = "auto") -> Precision:
        """The precision that `featurize` takes for this data, and why (`kindling.predict.batch.choose_precision`)."""
        from kindling.predict import batch

        return batch.choose_precision(self, df, precision)

    def predict(self, rows: Any, **options: Any) -> Any:
        """Predict: a DataFrame gives a DataFrame (see `kindling.predict.batch.predict`), a list gives a list.

        A list may hold image bytes, paths, PIL images, arrays, or dicts of columns; it needs no Spark.
        """
        if isinstance(rows, list | tuple):
            from kindling.predict import engine

            return engine.predict_list(self, rows, **options)
        from kindling.predict import batch

        return batch.predict(self, rows, **options)

    def evaluate(self, df: DataFrame, **options: Any) -> Report:
        """Loss, accuracy, precision, recall, F1, top-5 and the confusion matrix, exact under any partitioning.

        Of a net with several outputs the first that has a target is looked at, or `output="name"`. Where rows have any
        number of labels the figures are those of `kindling.many_labels.LabelReport`.
        """
        from kindling.predict import batch

        return batch.evaluate(self, df, **options)

    def fit(
        self,
        df: DataFrame,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        loss: Loss | Mapping[str, Loss] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        strategy: Strategy | None = None,
        validation: DataFrame | None = None,
        metrics: Mapping[str, Metric] | None = None,
        target: str | Mapping[str, str] | None = None,
        weight_column: str | None = None,
        augment: Mapping[str, Sequence[Augmentation]] | Sequence[Augmentation] | None = None,
        workers: int | None = None,
        resources: ResourceProfile | None = None,
        threads: int = 1,
        seed: int = 0,
        schedule: Callable[..., Any] | None = None,
        schedule_every: str = "epoch",
        warmup_steps: int = 0,
        accumulate: int = 1,
        bucketed: bool = True,
        shuffle: str = "rows",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: str = "fp32",
        frozen_precision: str = "auto",
        ema_decay: float | None = None,
        early_stopping: EarlyStopping | None = None,
        max_steps: int | None = None,
        max_seconds: float | None = None,
        validate_every: int = 1,
        validate_every_steps: int | None = None,
        run: str | Path | None = None,
        resume: str | bool = "auto",
        about: Mapping[str, Any] | None = None,
        on_error: str = "fail",
        key: str | None = None,
        checkpoints: Checkpoints | None = None,
        timeout_s: float = 600.0,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Model:
        """Train on Spark; returns the trained model. A killed worker is survived: the others start again with it.

        A frozen front part is run once over the data, and only the rest is trained.

        Args:
            df: the training rows, with the columns that the preparation reads and `target`.
            epochs: passes over the data.
            batch_size: rows that go through the net at a time on one worker; a step takes this times `accumulate`
                times `workers`.
            optimizer: makes a torch optimizer of the parameters, `partial(torch.optim.SGD, lr=0.1)`; Adam if None. With
                `kindling.decay_groups` or `kindling.parameter_groups` around it, settings differ by parameter; a
                factory whose first argument is called `named_parameters` gets (name, parameter) pairs.
            loss: a torch loss of (outputs, targets); None: cross entropy for classes, binary cross entropy for lists of
                labels, squared error for numbers. Label smoothing and class weights are settings of torch's own losses.
                For a net with several outputs, losses by the outputs' names; `kindling.OutputsLoss` is one that reads
                several of them together.
            loss_weights: what each output's loss counts, by the outputs' names; 1 where it is not named.
            strategy: how workers agree; `AllReduce()` if None.
            validation: rows to measure after every epoch, in float32, as `evaluate` does.
            metrics: further figures of the validation, by name: functions of (outputs, targets) that give each row's
                number, whose mean is taken, or metrics with update, merge_state and compute, as torchmetrics has them.
                Where several outputs have targets, they get dicts by the outputs' names.
            target: the column to learn; the model's own (`"label"` at first) if None. For a net with several outputs,
                columns by the outputs' names.
            augment: changes to images that each row draws anew in every epoch, in training only:
                `[kindling.prepare.RandomCrop(4), kindling.prepare.RandomFlip()]`; by the inputs' names for a net with
                several inputs of images. A frozen front is then run in every step.
            weight_column: what each row counts; a weight of 2 is as good as the row twice.
            workers: tasks that train at the same time; as many as the session has slots for if None.
            resources: what Spark gives the tasks that train, and no others (stage-level scheduling): a
                `pyspark.resource.ResourceProfile`, with a GPU for each task, say, while packing runs on all cores.
            threads: computing threads of each worker.
            seed: of the order of rows and of the net's random draws. The same data, seed, workers, threads, processor
                type and versions give the same bits.
            schedule: makes a torch scheduler of the optimizer: `partial(torch.optim.lr_scheduler.StepLR, step_size=5)`.
                A parameter `total_steps` that is left open gets the length of the training. `ReduceLROnPlateau` looks
                at the validation's loss, or the epoch's where there is no validation.
            schedule_every: the schedule moves on after each `"epoch"` or each `"step"`.
            warmup_steps: steps over which learning rates rise in a straight line to what they are set to.
            accumulate: parts in which the rows of a step go through the net, one after the other: a larger batch in the
                same memory.
            bucketed: where an input is a sequence (`kindling.prepare.SequenceStep`), take rows of like length in the
                same steps, for less padding; False: any rows.
            shuffle: how each epoch draws its order. `"rows"`: any row may come at any time. `"blocks"`: for data larger
                than memory on disks that seek slowly; rows are sorted on the worker's disk once, and every epoch reads
                about a megabyte of them at a time, the blocks and the rows within each in drawn order.
            clip_norm: bound on the norm of all gradients together.
            clip_value: bound on the size of each number of a gradient.
            precision: `"bf16"` trains in bfloat16 where torch's autocast does; weights stay float32.
            frozen_precision: of the frozen part: `"fp32"`, `"bf16"`, or `"auto"`, which tries.
            ema_decay: keep a running average of the weights (0.999, say); it is what is validated and returned.
            early_stopping: when to end for want of progress: `kindling.EarlyStopping(patience=3)`.
            max_steps: end after so many steps.
            max_seconds: end after so many seconds of training.
            validate_every: epochs between validations.
            validate_every_steps: steps between further ones.
            run: run directory for events, checkpoints and the final model, on any file system. None keeps checkpoints
                in a temporary one.
            resume: what to do with a run that the directory holds already. `"auto"` goes on from its newest whole
                checkpoint, wherever in an epoch that is, or gives its model at once if it has ended; it refuses where
                data, model or settings are not what they were. There may be other workers, whose batches then change
                so that the global batch does not, and more `epochs`. True: there must be one. False: there must be
                none. `"anyway"` goes on although something changed.
            about: JSON values of yours that are kept with the run.
            on_error: broken rows `"fail"` the training or are left out (`"drop"`) and counted. A label that the
                model does not know is a broken row too.
            key: the column whose hash gives a row its place; `path` if there is one, else all columns read.
            checkpoints: when to write them and which to keep, `kindling.Checkpoints(steps=500, keep=3)`; one after each
                epoch if None.
            timeout_s: a worker without progress for so long is given up and all are started again; so long they wait,
                too, for one that Spark has no slot for yet.
            callbacks: functions called on the driver with every `kindling.Event` of the training, in order; one that
                raises `kindling.StopTraining` ends it soon, and the model is what has been trained so far. Where
                workers cannot reach the driver, events come only when the training is over.
            progress: show a progress bar.
        Raises: ConfigError, DataError, ModelError, TrainingError: what cannot work, from the driver, before or during
            the training.
        """
        from kindling.train.fit import fit
        from kindling.train.policy import Checkpoints
        from kindling.train.settings import LoopSettings

        return fit(
            self,
            df,
            settings=LoopSettings(
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                accumulate=accumulate,
                bucketed=bucketed,
                shuffle=shuffle,
                clip_norm=clip_norm,
                clip_value=clip_value,
                precision=precision,
                schedule_every=schedule_every,
                warmup_steps=warmup_steps,
                ema_decay=ema_decay,
                max_steps=max_steps,
                max_seconds=max_seconds,
                validate_every=validate_every,
                validate_every_steps=validate_every_steps,
                early_stopping=early_stopping,
                checkpoints=checkpoints or Checkpoints(),
            ),
            optimizer=optimizer,
            schedule=schedule,
            loss=loss,
            loss_weights=loss_weights,
            strategy=strategy,
            validation=validation,
            metrics=metrics,
            workers=workers,
            resources=resources,
            threads=threads,
            run=run,
            resume=resume,
            about=about,
            target=target,
            weight_column=weight_column,
            augment=augment,
            frozen_precision=frozen_precision,
            on_error=on_error,
            key=key,
            timeout_s=timeout_s,
            callbacks=callbacks,
            progress=progress,
        )

    def preflight(
        self,
        df: DataFrame,
        *,
        batch_size: int = 32,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        loss: Loss | Mapping[str, Loss] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        strategy: Strategy | None = None,
        validation: DataFrame | None = None,
        target: str | Mapping[str, str] | None = None,
        weight_column: str | None = None,
        workers: int | None = None,
        schedule: Callable[..., Any] | None = None,
        precision: str = "fp32",
        run: str | Path | None = None,
        key: str | None = None,
    ) -> Checklist:
        """Look, in seconds, whether `fit` with these arguments can work; trains nothing.

        Columns and labels, the net with its loss and optimizer, what has to be sent, task slots, Python, torch and
        kindling on the executors, whether they reach this driver, the run directory and the code, one pass forward and
        back over the first rows of the data, and the memory that a worker needs against what is free.

        Returns: a list of what was looked at, true where nothing has failed. Each failure is a sentence with its fix.
        """
        from kindling.train.checklist import check_all
        from kindling.train.settings import LoopSettings

        return check_all(
            self,
            df,
            settings=LoopSettings(batch_size=batch_size, precision=precision),
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            weight_column=weight_column,
            strategy=strategy,
            schedule=schedule,
            validation=validation,
            workers=workers,
            run=run,
            target=target,
            key=key,
        )

    # --------------------------------------------------------------------------------------------------- keeping

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        dry_run: bool = False,
        spark: SparkSession | None = None,
    ) -> None:
        """Write a bundle: architecture, weights, preparation, labels, history, checksums. No code, no pickle.

        With `dry_run` nothing is written: it raises what saving would, before a long training, say.
        Raises: ConfigError, when something is there already; ModelError, when the module cannot be stored.
        """
        from kindling import bundle

        bundle.save(self, str(path), overwrite=overwrite, dry_run=dry_run, spark=spark)

    def export(
        self,
        path: str | Path,
        *,
        preparation: bool = True,
        overwrite: bool = False,
        spark: SparkSession | None = None,
    ) -> None:
        """Write the model for others: `.onnx`, `.pt2`, `.safetensors`, or a folder that runs with torch alone.

        The path's ending decides (`kindling.formats.export.export`). The file is compared with the model on random rows
        before it is kept; with `preparation`, the normalising of its inputs is part of the graph.
        Raises: ConfigError, when something is there already; ModelError, when it cannot be written so.
        """
        from kindling.formats.export import export

        export(self, path, preparation=preparation, overwrite=overwrite, spark=spark)


def load(
    source: str | Path | Model,
    weights: str | Path | None = None,
    *,
    layout: str | None = None,
    cache: str | Path | None = None,
    classes: Sequence[type] = (),
    spark: SparkSession | None = None,
    progress: bool = True,
    **options: Any,
) -> Model:
    """A model by name, from a bundle, or from a file of another system.

    Args:
        source: a net of kindling (`"vgg16"`), the path of a bundle that `Model.save` wrote, or a local file of Caffe
            (`.prototxt`, `.caffemodel`), Deeplearning4j (zip), H2O (MOJO), BigDL, Keras (`.keras`, `.h5`), TensorFlow
            (`.pb`, SavedModel, `.tflite`), ONNX or `torch.export` (`.pt2`): told apart by what is in it.
            `torchvision:NAME`, `timm:NAME`, `hf:NAME`, `keras:NAME` for nets of those libraries. Or a Model, to be
            given other weights.
        weights: for a net by name: a file, a URL, or the name of published weights; None draws random ones. For a
            `.prototxt`, its `.caffemodel`. For a Model, a `.safetensors` or `.pth` file of its own names.
        layout: which of the net's layouts the file has, where it fits several (`kindling.nets.NETS[name].layouts`).
        cache: folder for downloaded files; `KINDLING_CACHE`, else `~/.cache/kindling`, if None.
        classes: for a bundle of a module that is no graph: the classes it may be made of.
        spark: the session whose file systems to use for a remote path; the active one if None.
        progress: show a bar while weights are downloaded.
        options: of the format's reader, such as `net=` or `phase=` (`kindling.formats.caffe.read`).
    Raises: FormatError, for a damaged or hostile file and for a name that is neither; StorageError.

    >>> load("lenet")
    Model 'lenet': image (N, 1, 28, 28) float32 -> predictions (N, 10) float32; ...
    """
    from kindling import nets

    if isinstance(source, Model):
        return _weighted(source, weights, options)
    name = str(source)
    if name in nets.NETS and not options:
        parts = nets.load_net(name, weights=weights, layout=layout, cache=cache, progress=progress)
        return Model(
            module=parts.module,
            signature=parts.signature,
            preparation=parts.preparation,
            labels=parts.labels,
            name=parts.name,
            source=parts.source,
        )
    imported = _imported(name, weights, options)
    if imported is not None:
        return imported
    if options:
        raise ConfigError("options", sorted(options), f"mean nothing for {name!r}", "Leave them out")
    if weights is not None:
        raise ConfigError(
            "source", name, f"is no net that takes weights.{did_you_mean(name, nets.NETS)}", "Name one of them"
        )
    if "/" not in name and not Path(name).exists():
        raise FormatError(f"{name!r} is neither a net of kindling nor a bundle on disk.{did_you_mean(name, nets.NETS)}")
    from kindling import bundle

    return bundle.load(name, classes=classes, spark=spark)


def _weighted(model: Model, weights: str | Path | None, options: Mapping[str, Any]) -> Model:
    """The same model with the numbers of a local file."""
    from kindling.formats.files import file_digest, open_weights
    from kindling.formats.weights import into

    if weights is None or options:
        seen = sorted(options) or weights
        raise ConfigError("weights", seen, "leaves a Model as it is", "Give weights=, the file to take them from")
    file = Path(weights)
    module = into(model.module, open_weights(file), str(file))
    source = {**model.source, "weights": {"file": file.name, "sha256": file_digest(file)}}
    return replace(model, module=module, source=source, history=())


def _imported(source: str, weights: str | Path | None, options: Mapping[str, Any]) -> Model | None:
    """The model in a local file of another system; None where there is none, or a bundle."""
    from kindling.bundle import MANIFEST
    from kindling.formats.models import LIBRARIES, names, open_model

    if source.partition(":")[0] in LIBRARIES and not Path(source).exists():
        from kindling.formats import hub

        if hub.prefix_of(source) is not None:
            return as_model(hub.open_named(source, weights, **options))
    path = Path(source)
    if not path.exists() or (path / MANIFEST).exists():
        return None
    found = open_model(path, **({} if weights is None else {"weights": weights}), **options)
    if found is None:
        if path.is_file() and weights is None and not options:
            raise FormatError(f"{source} is neither a bundle nor a model that kindling reads ({', '.join(names())}).")
        return None
    return as_model(found)


def as_model(found: Imported) -> Model:
    """What a format's reader found, as a Model."""
    return Model(
        module=found.module,
        signature=found.signature,
        preparation=found.preparation,
        labels=found.labels,
        name=found.name,
        source=found.source,
    )


def _tensor_spec(step: Step) -> TensorSpec:
    """What a step's tensor looks like, from one row of zeros."""
    import numpy as np

    tensor = step.batch({name: np.zeros((1, *shape), dtype) for name, (dtype, shape) in step.packed_spec().items()})
    if isinstance(step, SequenceStep):
        return TensorSpec(("N", f"L_{step.name}"), step.dtype)
    return TensorSpec(("N", *tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
