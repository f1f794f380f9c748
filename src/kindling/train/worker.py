"""One training task: spool, meet, join the group, restore, train, report.

`run_worker` is what Spark calls; its inputs are its signature. torch is imported only after the thread settings stand.
Rank 0 writes checkpoints and returns the weights; every rank returns its report: over its line to the driver, or, where
there is none, as rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import struct
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kindling.errors import DataError, KindlingError, StorageError, TrainingError, from_text, to_wire
from kindling.train import devices
from kindling.train.meeting import BarrierMeeting, ClosedError, LostError, Meeting, TableMeeting
from kindling.train.settings import WorkerSpec, silence_s
from kindling.train.table import TRAINING

if TYPE_CHECKING:
    from kindling.storage import Place
    from kindling.train.events import EventLog
    from kindling.train.restore import Start
    from kindling.train.settings import UserCode
    from kindling.train.spool import Rows
    from kindling.train.strategies import Replica
    from kindling.train.writer import Writer

REPORT_SCHEMA = "rank int, kind string, part int, data binary"
_ARROW_SCHEMA = pa.schema([("rank", pa.int32()), ("kind", pa.string()), ("part", pa.int32()), ("data", pa.binary())])
NO_ROWS = "there is not one row to {} on: the DataFrame is empty, or every row was broken."
_PART_BYTES = 16 << 20
_LAST_WORDS_S = 5.0
_JOIN_S = 120.0
_A_DAY_S = 86400.0
_SIOCGIFADDR = 0x8915  # netdevice(7)


def run_worker(spec: WorkerSpec, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Body of one training task: blobs in, report rows out (`REPORT_SCHEMA`)."""
    from kindling.threads import settle

    settle(spec.threads)
    for kind, part, data in _Worker(spec).run(batches):
        yield pa.RecordBatch.from_arrays(
            [
                pa.array([value], field.type)
                for value, field in zip((_rank(), kind, part, data), _ARROW_SCHEMA, strict=True)
            ],
            schema=_ARROW_SCHEMA,
        )


def _rank() -> int:
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    return int(context.partitionId())


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every worker knows after meeting the others."""

    host: str
    port: int
    counts_V: np.ndarray
    validation_rows: int
    notes: list[Mapping[str, Any]]
    attempt: int
    directory_seen: bool
    one_machine: bool
    device: str


class _Worker:
    def __init__(self, spec: WorkerSpec) -> None:
        from kindling.train.events import EventLog

        self.spec, self.rank = spec, _rank()
        self.log: EventLog = EventLog(spec.run, self.rank)
        self.met = False

    def run(self, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, int, bytes]]:
        from kindling.train.spool import TRAIN, VALIDATION, Spool

        meeting: Meeting | None = None
        spool: Spool | None = None

        try:
            from kindling.prepare import Preparation

            meeting = _come(self.spec, self.rank)
            self.log.say = meeting.say
            self.log.emit("start")
            began = time.perf_counter()
            spool = Spool(Preparation.from_json(self.spec.preparation).packed_spec(targets=True))
            for batch in batches:
                streams, notes, blobs = (
                    batch.column(batch.schema.get_field_index(n)) for n in ("stream", "notes", "blob")
                )
                for row in range(batch.num_rows):
                    spool.add(streams[row].as_py(), blobs[row].as_buffer(), notes[row].as_py())
                    meeting.beat()
            rows = [spool.rows(stream) for stream in (TRAIN, VALIDATION)]
            if self.spec.loop.shuffle == "blocks":
                rows = [spool.in_order(one, meeting.beat) for one in rows]
            self.log.emit("spooled", seconds=time.perf_counter() - began, bytes=spool.bytes)
            yield from self._train(rows, spool.notes, meeting)
        except ClosedError:
            pass  # all have finished, and one of them was lost on its way out: the driver has everything already
        except KindlingError as error:
            yield from self._give_up(error, meeting)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # Not a fault of the machine: it would happen again in every further attempt.
            where = traceback.format_tb(error.__traceback__)[-1].strip()
            told = TrainingError(f"worker {self.rank} failed: {type(error).__name__}: {error}\n{where}")
            yield from self._give_up(told, meeting)
        except Exception as error:
            if meeting is not None and not isinstance(error, LostError):
                meeting.fail(f"{type(error).__name__}: {error}", None)
            raise
        finally:
            if meeting is not None:
                meeting.close()
            if spool is not None:
                spool.close()

    def _give_up(self, error: KindlingError, meeting: Meeting | None) -> Iterator[tuple[str, int, bytes]]:
        """End, for a reason that a further attempt cannot cure unless it is a full disk.

        Those who are told of it, at the meeting or by the driver, end by themselves, and the reason is a row of the
        result: nothing is tried again. Otherwise the task must fail, so that Spark stops those that wait for it.
        """
        wire = to_wire(error)
        self.log.emit("error", wire=wire)
        curable = isinstance(error, StorageError) and not self.met
        if meeting is not None:
            meeting.fail(str(error), None if curable else wire)
        if curable or not (self.met or (meeting is not None and meeting.on_line)):
            raise RuntimeError(wire)
        yield "error", 0, wire.encode()

    def _train(
        self, rows: list[Rows], notes: list[dict[str, Any]], meeting: Meeting
    ) -> Iterator[tuple[str, int, bytes]]:
        import torch.distributed as dist

        from kindling.train.feed import Feed
        from kindling.train.spool import told
        from kindling.train.strategies import Comms, GroupComms, SharedMemoryComms, SoloComms

        spec = self.spec
        feed, validation = (Feed(told(one, meeting.beat), blocks=spec.loop.shuffle == "blocks") for one in rows)
        place = _visible(spec)
        if place is None and spec.listener is not None and spec.run_directory is not None:
            from kindling.train.remote import RemotePlace

            place = RemotePlace(spec.run_directory, spec.listener)
            if spec.directory_asked:
                text = f"{spec.run_directory} is not seen from here: what is kept there goes through the driver."
                self.log.emit("warning", text=text)
        store, plan = self._meet(meeting, notes, feed, validation, place)
        self.log.attempt = plan.attempt
        meeting.enter(TRAINING)
        self.log.emit("met", host=plan.host, attempt=plan.attempt, rows=len(feed), device=plan.device)
        if not plan.directory_seen:
            if self.rank == 0 and spec.directory_asked:
                self.log.emit(
                    "warning", text=f"not every worker can see {spec.run_directory}: no checkpoints are kept."
                )
            place = None
        if spec.workers > 1:
            from datetime import timedelta

            # The first optimizer imports it. Imported while a group exists, it keeps the group alive (seen with torch
            # 2.13): its connections then stay open, and the others wait a minute for a worker that has given up.
            import torch._dynamo  # noqa: F401

            _use_interface(plan.host)
            # Over its line to the driver a worker hears who is lost: waiting for a slow one is no fault then.
            patience_s = _A_DAY_S if meeting.on_line else spec.timeout_s
            dist.init_process_group(
                devices.backend(plan.device),
                store=dist.PrefixStore(f"attempt-{plan.attempt}", store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=spec.workers,
                timeout=timedelta(seconds=patience_s),
            )
        comms: Comms = SoloComms()
        try:
            if spec.workers > 1:
                shared = SharedMemoryComms.open(store) if plan.one_machine and plan.device == devices.CPU else None
                comms = shared or GroupComms()
            # gloo may connect only now; a worker that stopped before would keep the others trying for a minute.
            comms.meet()
            report = self._report(self._loop(feed, validation, plan, comms, store, place, meeting), plan, place)
            if meeting.on_line:
                for kind, part, data in report:
                    meeting.deliver(kind, part, data)
                meeting.all_gather("finish", "")  # from here on the driver has everything
            else:
                yield from report
                comms.meet()  # nobody leaves while another still needs the store
        except KindlingError as error:
            _leave_word(store, to_wire(error), self.rank, comms)
            raise
        except LostError:
            raise
        except RuntimeError as error:
            # A broken connection: another worker died (Spark starts us all again) or left word of what it met.
            word = _read_word(store)
            found = from_text(word) if word else None
            if found is not None:
                raise found from None
            why = meeting.why_lost() or f"worker {self.rank} of {spec.workers} lost its group: {error}"
            raise LostError(why) from error
        finally:
            comms.close()
            if dist.is_initialized():
                with contextlib.suppress(RuntimeError):
                    dist.destroy_process_group()

    def _meet(
        self, meeting: Meeting, notes: list[dict[str, Any]], feed: Any, validation: Any, place: Place | None
    ) -> tuple[Any, _Plan]:
        """The one meeting: addresses, counts, and whether anybody has bad news."""
        from kindling.train.strategies.shared_memory import host_token

        store, port = _open_store(self.rank, meeting, self.spec.workers)
        attempt = 0
        if self.rank == 0 and place is not None:
            attempt = sum(1 for name in place.list("attempts") if name.endswith(".json"))
            about = {"unix_s": time.time(), "host": meeting.host}
            try:
                place.write(f"attempts/{attempt}.json", json.dumps(about).encode())
            except (StorageError, OSError) as error:  # a full disk costs checkpoints, not the training
                self.log.emit("warning", text=f"attempt {attempt} could not be noted: {error}")
        mine = {
            "host": meeting.host,
            "port": port,
            "counts": feed.counts().tolist(),
            "validation": len(validation),
            "notes": notes,
            "classes": _classes_seen(feed, self.spec) if self.spec.classes else [],
            "sees": place is not None,
            "attempt": attempt,
            "machine": host_token(),
            "device": devices.own_device(),
        }
        everyone = [json.loads(text) for text in meeting.all_gather("meet", json.dumps(mine))]
        self.met = True
        for note in (note for one in everyone for note in one["notes"]):
            if "fatal" in note:
                raise from_text(note["fatal"]) or DataError("a row could not be packed.")
        counts_V = np.sum([one["counts"] for one in everyone], axis=0)
        if not counts_V.sum():
            raise DataError(NO_ROWS.format("train"))
        if self.spec.validates and not sum(one["validation"] for one in everyone):
            raise DataError(NO_ROWS.format("validate"))
        seen = sorted({label for one in everyone for label in one["classes"]})
        if self.spec.classes and self.spec.classes > 1 and len(seen) == 1:
            raise DataError(
                f"all {int(counts_V.sum()):,} rows are of one class ({_class_name(self.spec, seen[0])}), so there is "
                "nothing to tell apart. "
                "Is the label column the right one, and the data unfiltered?"
            )
        plan = _Plan(
            host=everyone[0]["host"],
            port=everyone[0]["port"],
            counts_V=counts_V,
            validation_rows=sum(one["validation"] for one in everyone),
            notes=[note for one in everyone for note in one["notes"]],
            attempt=everyone[0]["attempt"],
            directory_seen=all(one["sees"] for one in everyone),
            one_machine=bool(mine["machine"]) and len({one["machine"] for one in everyone}) == 1,
            device=devices.agree([one["device"] for one in everyone], mine["device"]),
        )
        if store is None and self.spec.workers > 1:
            store = _join_store(plan.host, plan.port, self.spec.workers)
        return store, plan

    def _loop(
        self, feed: Any, validation: Any, plan: _Plan, comms: Any, store: Any, place: Place | None, meeting: Meeting
    ) -> tuple[Any, Any, Any]:
        import cloudpickle

        from kindling import ship, surgery
        from kindling.prepare import Preparation
        from kindling.prepare.augment import augmentation_from_json
        from kindling.signature import Signature
        from kindling.train.loop import Loop
        from kindling.train.run import versions
        from kindling.train.spool import data_fingerprint
        from kindling.train.strategies import Replica
        from kindling.train.writer import LocalBoard, StoreBoard, Writer

        spec = self.spec
        code: UserCode = cloudpickle.loads(spec.code)
        if plan.device != devices.CPU and not code.strategy.on_gpu:
            raise TrainingError(
                f"{type(code.strategy).__name__} sends from the CPU's memory only, and this worker has {plan.device}. "
                "Leave out spark.task.resource.gpu.amount, or use another strategy."
            )
        module = _own_copy(ship.open_module(spec.module)).to(plan.device)
        surgery.set_training(module, spec.frozen)
        try:
            replica = Replica.of(module, code.optimizer)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"the optimizer could not be made: {error}.") from error
        start = self._start(place, plan, comms, replica, code.strategy)
        about = {
            "run": spec.name,
            "global_batch": spec.global_batch,
            "data": data_fingerprint(plan.notes),
            "resumed": start.resumed,
            "versions": versions(),
        }
        writer = None
        if place is not None:
            writer = Writer(
                place,
                LocalBoard() if store is None else StoreBoard(store),
                spec.loop.checkpoints,
                rank=self.rank,
                world=comms.world,
                attempt=plan.attempt,
                on_event=partial(_tell, self.log, place),
            )
        loop = Loop(
            settings=spec.loop,
            replica=replica,
            strategy=code.strategy,
            comms=comms,
            signature=Signature.from_json(spec.signature),
            preparation=Preparation.from_json(spec.preparation),
            loss=code.loss,
            metrics=code.metrics,
            augment={name: [augmentation_from_json(one) for one in steps] for name, steps in spec.augment.items()},
            schedule=code.schedule,
            feed=feed,
            counts_V=plan.counts_V,
            frozen=spec.frozen,
            hooks=_Hooks(self.log, writer, about, meeting),
            may_be_asked=spec.may_be_stopped,
            validation=validation if plan.validation_rows else None,
            classes=spec.classes,
            device=plan.device,
            new_optimizer=spec.new_optimizer,
            global_batch=spec.global_batch,
        )
        try:
            history = loop.run(start.state)
            if writer is not None:
                writer.wait()
        finally:
            if writer is not None:
                writer.stop()
        return module, history, start.resumed

    def _start(self, place: Place | None, plan: _Plan, comms: Any, replica: Replica, strategy: Any) -> Start:
        """From where to go on: the newest checkpoint, if this is not the beginning of the run."""
        from kindling.train.restore import RNG, Circumstances, Start, restore, set_generators
        from kindling.train.spool import data_fingerprint

        if place is None or plan.attempt == 0:
            return Start(None, [])
        fits = Circumstances(
            run=self.spec.name,
            strategy=strategy,
            statistics=bool(replica.statistics()),
            global_batch=self.spec.global_batch,
            data=data_fingerprint(plan.notes),
            anyway=self.spec.resume == "anyway",
        )
        start = restore(place, comms, fits, lambda text: self.log.emit("warning", text=text))
        if start.state is not None:
            set_generators(start.state[RNG])
            self.log.emit("resumed", **start.resumed[-1])
        return start

    def _report(
        self, trained: tuple[Any, Any, Any], plan: _Plan, place: Place | None
    ) -> Iterator[tuple[str, int, bytes]]:
        from safetensors.torch import save

        module, history, resumed = trained
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
        blob = save(state)
        report = {
            "attempt": plan.attempt,
            "history": history,
            "resumed": resumed,
            "rows": int(plan.counts_V.sum()),
            "sha256": hashlib.sha256(blob).hexdigest(),
            "notes": plan.notes,
            "pid": os.getpid(),
        }
        self.log.emit("finish", sha256=report["sha256"])
        _keep_events(place, self.log)
        yield "report", 0, json.dumps(report).encode()
        yield "events", 0, "\n".join(event.to_line() for event in self.log.events).encode()
        if self.rank == 0:
            for part, start in enumerate(range(0, len(blob), _PART_BYTES)):
                yield "weights", part, blob[start : start + _PART_BYTES]


class _Hooks:
    """The loop's hooks on a worker: events and checkpoints."""

    def __init__(self, log: EventLog, writer: Writer | None, about: Mapping[str, Any], meeting: Meeting) -> None:
        self._log, self._writer, self._about, self._meeting = log, writer, about, meeting

    def on_event(self, kind: str, *, step: int, epoch: int, keep: bool = True, **data: Any) -> None:
        self._log.emit(kind, step=step, epoch=epoch, keep=keep, **data)

    def stop_asked(self) -> bool:
        return self._meeting.stop_asked

    def busy(self) -> bool:
        return self._writer is not None and self._writer.busy

    def on_checkpoint(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        from kindling.train.restore import RNG, generators

        if self._writer is not None:
            told = {**self._about, **about, "unix_s": time.time()}
            self._writer.take(step, {**state, RNG: generators()}, told)


def _tell(log: EventLog, place: Place, kind: str, *, step: int, epoch: int = 0, **data: Any) -> None:
    """What the writing thread has to say; with a checkpoint go the events so far."""
    log.emit(kind, step=step, epoch=epoch, **data)
    if kind == "checkpoint":
        _keep_events(place, log, step)


def _keep_events(place: Place | None, log: EventLog, step: int = 0) -> None:
    """The events since the last part, as a part of their own: written parts are never changed."""
    if place is None:
        return
    part, events = log.take()
    if events:
        lines = "\n".join(event.to_line() for event in events)
        try:
            place.write(f"events/{log.attempt}/{log.rank}/{part}.jsonl", lines.encode())
        except (StorageError, OSError) as error:
            log.emit("warning", step=step, text=f"events could not be written: {error}")


def _visible(spec: WorkerSpec) -> Place | None:
    """The run directory, if this worker sees the same one as the driver."""
    from kindling.storage import open_place

    if spec.run_directory is None:
        return None
    try:
        place = open_place(spec.run_directory)
        return place if place.read("beacon").decode() == spec.beacon else None
    except (KindlingError, OSError):
        return None


def _own_copy(module: Any) -> Any:
    """The module with weights of its own, contiguous and writable; weights that layers share stay shared."""
    import copy

    import torch

    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        value = tensor.detach().contiguous().clone()
        memo[id(tensor)] = torch.nn.Parameter(value) if isinstance(tensor, torch.nn.Parameter) else value
    return copy.deepcopy(module, memo)


def _classes_seen(feed: Any, spec: WorkerSpec) -> list[int]:
    """At most two of the classes that occur here: enough to know whether there is more than one."""
    from kindling.prepare import Preparation

    (name, *_) = (step.name for step in Preparation.from_json(spec.preparation).targets)
    values = feed.column(name)
    return [int(value) for value in np.unique(values)[:2]] if len(values) else []


def _class_name(spec: WorkerSpec, number: int) -> str:
    from kindling.prepare import Preparation

    (step, *_) = Preparation.from_json(spec.preparation).targets
    names = getattr(step, "labels", ())
    return repr(names[number]) if number < len(names) else str(number)


def _come(spec: WorkerSpec, rank: int) -> Meeting:
    """Take this worker's seat at the driver's table, or stand in Spark's barrier."""
    from pyspark import BarrierTaskContext, TaskContext

    context = TaskContext.get()
    host = None
    if isinstance(context, BarrierTaskContext):
        host = context.getTaskInfos()[rank].address.rpartition(":")[0].strip("[]") or None
        if spec.listener is None:
            return BarrierMeeting(host or "127.0.0.1", context.allGather)
    assert spec.listener is not None
    assert context is not None
    host = host or os.environ.get("SPARK_LOCAL_IP") or os.environ.get("SPARK_LOCAL_HOSTNAME")
    return TableMeeting(
        spec.listener,
        rank=rank,
        task=int(context.taskAttemptId()),
        host=host,
        silence_s=silence_s(spec.timeout_s),
    )


def _open_store(rank: int, meeting: Meeting, workers: int) -> tuple[Any, int]:
    """Rank 0's rendezvous store, on this worker's own interface and a free port; nothing on the others."""
    if rank != 0 or workers == 1:
        return None, 0
    import torch.distributed as dist

    # Left to itself the store listens on every interface of the host.
    server = _bound(meeting.host, meeting.own_host, workers)
    port = server.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        meeting.host, port, workers, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
    )
    return store, port


def _bound(host: str, own_host: str, workers: int) -> socket.socket:
    """A listening socket at `host`, or at `own_host` where that name is not this machine's own but its container's."""
    for name in dict.fromkeys((host, own_host)):
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        try:
            return socket.create_server((name, 0), family=family, backlog=max(128, workers))
        except OSError as error:
            problem = error
    raise StorageError(f"worker 0 cannot listen at {host} or {own_host}: {problem}.")


def _join_store(host: str, port: int, workers: int) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    wait = timedelta(seconds=_JOIN_S)
    return dist.TCPStore(host, port, workers, is_master=False, timeout=wait)  # type: ignore[attr-defined]


def _use_interface(host: str) -> None:
    """Let gloo listen on the interface that reaches `host`, not on whatever this host's own name resolves to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # a datagram socket: nothing is sent
            own = probe.getsockname()[0]
        except OSError:
            return
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(request[20:24]) == own:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return


def _leave_word(store: Any, text: str, rank: int, comms: Any) -> None:
    """Tell the others why this worker stops, before its connections break; the store's host waits until they know."""
    if store is None:
        return
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):
        store.set("word", text)
        comms.close()
        if dist.is_initialized():
            others = dist.get_world_size() - 1
            dist.destroy_process_group()
            deadline = time.monotonic() + _LAST_WORDS_S
            while rank == 0 and store.add("heard", 0) < others and time.monotonic() < deadline:
                time.sleep(0.05)


def _read_word(store: Any) -> str | None:
    """What a worker that stopped has left, or None: then it died without a word."""
    try:
        if store is None or not store.check(["word"]):
            return None
        text: str = store.get("word").decode()
        store.add("heard", 1)
        return text
    except RuntimeError:
        return None
