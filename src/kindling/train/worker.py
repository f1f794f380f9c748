"""One barrier task: spool, meet, join the group, restore, train, report.

`run_worker` is what Spark calls; its inputs are its signature. torch is imported only after the thread settings stand.
Rank 0 writes checkpoints and returns the weights; every rank returns its report.
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

from kindling.errors import DataError, FormatError, KindlingError, StorageError, TrainingError, from_text, to_wire
from kindling.train.settings import WorkerSpec

if TYPE_CHECKING:
    from kindling.storage import Place
    from kindling.train.checkpoint import Checkpoint
    from kindling.train.events import EventLog
    from kindling.train.settings import UserCode
    from kindling.train.writer import Writer

REPORT_SCHEMA = "rank int, kind string, part int, data binary"
_ARROW_SCHEMA = pa.schema([("rank", pa.int32()), ("kind", pa.string()), ("part", pa.int32()), ("data", pa.binary())])
NO_ROWS = "there is not one row to train on: the DataFrame is empty, or every row was broken."
_PART_BYTES = 16 << 20
_LAST_WORDS_S = 5.0
_SIOCGIFADDR = 0x8915  # netdevice(7)


def run_worker(spec: WorkerSpec, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Body of one barrier task: blobs in, report rows out (`REPORT_SCHEMA`)."""
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
    from pyspark import BarrierTaskContext

    return int(BarrierTaskContext.get().partitionId())


@dataclass(frozen=True, slots=True)
class _Meeting:
    """What every worker knows after meeting the others."""

    host: str
    port: int
    counts_V: np.ndarray
    validation_rows: int
    notes: list[Mapping[str, Any]]
    attempt: int
    directory_seen: bool
    one_machine: bool


class _Worker:
    def __init__(self, spec: WorkerSpec) -> None:
        from kindling.train.events import EventLog

        self.spec, self.rank = spec, _rank()
        self.log: EventLog = EventLog(spec.run, self.rank, spec.listener)
        self.met = False

    def run(self, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, int, bytes]]:
        from kindling.train.spool import Spool

        spool = None
        try:
            from kindling.prepare import Preparation

            began = time.perf_counter()
            spool = Spool(self.spec.run, Preparation.from_json(self.spec.preparation).packed_spec(targets=True))
            self.log.emit("start")
            for batch in batches:
                streams, notes, blobs = (
                    batch.column(batch.schema.get_field_index(n)) for n in ("stream", "notes", "blob")
                )
                for row in range(batch.num_rows):
                    spool.add(streams[row].as_py(), blobs[row].as_buffer(), notes[row].as_py())
            self.log.emit("spooled", seconds=time.perf_counter() - began, bytes=spool.bytes)
            yield from self._train(spool)
        except KindlingError as error:
            yield from self._give_up(to_wire(error))
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # Not a fault of the machine: it would happen again in every further attempt.
            where = traceback.format_tb(error.__traceback__)[-1].strip()
            wire = to_wire(TrainingError(f"worker {self.rank} failed: {type(error).__name__}: {error}\n{where}"))
            yield from self._give_up(wire)
        finally:
            self.log.close()
            if spool is not None:
                spool.close()

    def _give_up(self, wire: str) -> Iterator[tuple[str, int, bytes]]:
        """End for a reason that a further attempt cannot cure.

        After the meeting every worker ends by itself and the reason is a row of the result: nothing is tried again. A
        worker that fails before it must fail its task, so that Spark stops those that wait for it.
        """
        self.log.emit("error", wire=wire)
        if not self.met:
            raise RuntimeError(wire)
        yield "error", 0, wire.encode()

    def _train(self, spool: Any) -> Iterator[tuple[str, int, bytes]]:
        import torch.distributed as dist

        from kindling.train.feed import Feed
        from kindling.train.spool import TRAIN, VALIDATION
        from kindling.train.strategies import Comms, GroupComms, SharedMemoryComms, SoloComms

        spec = self.spec
        feed, validation = Feed(spool.rows(TRAIN)), Feed(spool.rows(VALIDATION))
        place = _visible(spec)
        store, meeting = self._meet(spool, feed, validation, place is not None)
        self.log.attempt = meeting.attempt
        self.log.emit("met", host=meeting.host, attempt=meeting.attempt, rows=len(feed))
        if not meeting.directory_seen:
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

            _use_interface(meeting.host)
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"attempt-{meeting.attempt}", store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=spec.workers,
                timeout=timedelta(seconds=spec.collective_timeout_s),
            )
        comms: Comms = SoloComms()
        try:
            if spec.workers > 1:
                shared = SharedMemoryComms.open(store) if meeting.one_machine else None
                comms = shared or GroupComms()
            # gloo may connect only now; a worker that stopped before would keep the others trying for a minute.
            comms.meet()
            yield from self._report(self._loop(feed, validation, meeting, comms, store, place), meeting, place)
            comms.meet()  # nobody leaves while another still needs the store
        except KindlingError as error:
            _leave_word(store, to_wire(error), self.rank, comms)
            raise
        except RuntimeError as error:
            # A broken connection: another worker died (Spark starts us all again) or left word of what it met.
            word = _read_word(store)
            found = from_text(word) if word else None
            if found is not None:
                raise found from None
            raise RuntimeError(f"worker {self.rank} of {spec.workers} lost its group: {error}") from error
        finally:
            comms.close()
            if dist.is_initialized():
                with contextlib.suppress(RuntimeError):
                    dist.destroy_process_group()

    def _meet(self, spool: Any, feed: Any, validation: Any, sees: bool) -> tuple[Any, _Meeting]:
        """The one meeting through Spark: addresses, counts, and whether anybody has bad news."""
        from pyspark import BarrierTaskContext

        from kindling.train.strategies.shared_memory import host_token

        context = BarrierTaskContext.get()
        host = context.getTaskInfos()[self.rank].address.rpartition(":")[0] or "127.0.0.1"
        store, port = _open_store(self.rank, host, self.spec.workers)
        attempt = 0
        if self.rank == 0 and sees:
            place = _visible(self.spec)
            assert place is not None
            attempt = sum(1 for name in place.list("attempts") if name.endswith(".json"))
            place.write(f"attempts/{attempt}.json", json.dumps({"unix_s": time.time(), "host": host}).encode())
        mine = {
            "host": host,
            "port": port,
            "counts": feed.counts().tolist(),
            "validation": len(validation),
            "notes": spool.notes,
            "classes": _classes_seen(feed, self.spec) if self.spec.classes else [],
            "sees": sees,
            "attempt": attempt,
            "machine": host_token(),
        }
        everyone = [json.loads(text) for text in context.allGather(json.dumps(mine))]
        self.met = True
        for note in (note for one in everyone for note in one["notes"]):
            if "fatal" in note:
                raise from_text(note["fatal"]) or DataError("a row could not be packed.")
        counts_V = np.sum([one["counts"] for one in everyone], axis=0)
        if not counts_V.sum():
            raise DataError(NO_ROWS)
        seen = sorted({label for one in everyone for label in one["classes"]})
        if self.spec.classes and self.spec.classes > 1 and len(seen) == 1:
            raise DataError(
                f"all {int(counts_V.sum()):,} rows are of one class ({seen[0]!r}), so there is nothing to tell apart. "
                "Is the label column the right one, and the data unfiltered?"
            )
        meeting = _Meeting(
            host=everyone[0]["host"],
            port=everyone[0]["port"],
            counts_V=counts_V,
            validation_rows=sum(one["validation"] for one in everyone),
            notes=[note for one in everyone for note in one["notes"]],
            attempt=everyone[0]["attempt"],
            directory_seen=all(one["sees"] for one in everyone),
            one_machine=bool(mine["machine"]) and len({one["machine"] for one in everyone}) == 1,
        )
        if store is None and self.spec.workers > 1:
            store = _join_store(meeting.host, meeting.port, self.spec.workers, self.spec.meeting_timeout_s)
        return store, meeting

    def _loop(
        self, feed: Any, validation: Any, meeting: _Meeting, comms: Any, store: Any, place: Place | None
    ) -> tuple[Any, Any]:
        import cloudpickle

        from kindling import ship, surgery
        from kindling.prepare import Preparation
        from kindling.signature import Signature
        from kindling.train.loop import Loop
        from kindling.train.policy import Checkpoints
        from kindling.train.strategies import Replica
        from kindling.train.writer import LocalBoard, StoreBoard, Writer

        spec = self.spec
        code: UserCode = cloudpickle.loads(spec.code)
        module = _own_copy(ship.open_module(spec.module))
        surgery.set_training(module, spec.frozen)
        try:
            replica = Replica.of(module, code.optimizer)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"the optimizer could not be made: {error}.") from error
        writer = None
        if place is not None:
            writer = Writer(
                place,
                LocalBoard() if store is None else StoreBoard(store),
                Checkpoints(epochs=spec.loop.checkpoint_every, keep=spec.loop.checkpoints_kept),
                rank=self.rank,
                world=comms.world,
                attempt=meeting.attempt,
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
            schedule=code.schedule,
            feed=feed,
            counts_V=meeting.counts_V,
            frozen=spec.frozen,
            hooks=_Hooks(self.log, writer, comms, spec),
            validation=validation if meeting.validation_rows else None,
            classes=spec.classes,
        )
        restored = None
        if place is not None and meeting.attempt > 0:
            restored = self._agree_on_checkpoint(place, comms)
        try:
            history = loop.run(restored.states[self.rank] if restored else None)
            if writer is not None:
                writer.wait()
        finally:
            if writer is not None:
                writer.stop()
        return module, history

    def _agree_on_checkpoint(self, place: Place, comms: Any) -> Checkpoint | None:
        """The newest checkpoint that every worker can read whole."""
        from kindling.train import checkpoint

        unread = set()
        while True:
            steps = [step for step in checkpoint.steps_on_disk(place) if step not in unread]
            mine = None
            for step in steps:
                try:
                    mine = checkpoint.read(place, step, [self.rank])
                    break
                except FormatError as error:
                    self.log.emit("warning", text=f"{error} The one before it is used.")
                    unread.add(step)
            newest = [int(v[0]) for v in comms.gather(np.array([mine.step if mine else -1], np.int64))]
            if len(set(newest)) == 1:
                if mine is not None:
                    self.log.emit("resumed", step=mine.step)
                return mine
            unread |= {step for step in steps if step > min(newest)}

    def _report(
        self, trained: tuple[Any, Any], meeting: _Meeting, place: Place | None
    ) -> Iterator[tuple[str, int, bytes]]:
        from safetensors.torch import save

        module, history = trained
        state = {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}
        blob = save(state)
        report = {
            "attempt": meeting.attempt,
            "history": history,
            "rows": int(meeting.counts_V.sum()),
            "sha256": hashlib.sha256(blob).hexdigest(),
            "notes": meeting.notes,
            "pid": os.getpid(),
        }
        self.log.emit("finish", sha256=report["sha256"])
        _write_events(place, self.log)
        yield "report", 0, json.dumps(report).encode()
        yield "events", 0, "\n".join(event.to_line() for event in self.log.events).encode()
        if self.rank == 0:
            for part, start in enumerate(range(0, len(blob), _PART_BYTES)):
                yield "weights", part, blob[start : start + _PART_BYTES]


class _Hooks:
    """The loop's hooks on a worker: events and checkpoints."""

    def __init__(self, log: EventLog, writer: Writer | None, comms: Any, spec: WorkerSpec) -> None:
        self._log, self._writer, self._comms, self._spec = log, writer, comms, spec

    def on_event(self, kind: str, *, step: int, epoch: int, keep: bool = True, **data: Any) -> None:
        self._log.emit(kind, step=step, epoch=epoch, keep=keep, **data)

    def stop_asked(self) -> bool:
        return False

    def on_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.take(step, state, {"run": self._spec.run})


def _tell(log: EventLog, place: Place, kind: str, *, step: int, epoch: int = 0, **data: Any) -> None:
    """What the writing thread has to say; with a checkpoint go the events so far."""
    log.emit(kind, step=step, epoch=epoch, **data)
    if kind == "checkpoint":
        try:
            _write_events(place, log)
        except (StorageError, OSError) as error:
            log.emit("warning", step=step, text=f"events could not be written: {error}")


def _write_events(place: Place | None, log: EventLog) -> None:
    """The events since the last part, as a part of their own: written parts are never changed."""
    if place is None:
        return
    part, events = log.take()
    if events:
        lines = "\n".join(event.to_line() for event in events)
        place.write(f"events/{log.attempt}/{log.rank}/{part}.jsonl", lines.encode())


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

    (name,) = (step.name for step in Preparation.from_json(spec.preparation).targets)
    values = feed.column(name)
    return [int(value) for value in np.unique(values)[:2]] if len(values) else []


def _open_store(rank: int, host: str, workers: int) -> tuple[Any, int]:
    """Rank 0's rendezvous store on a free port; nothing on the others."""
    if rank != 0 or workers == 1:
        return None, 0
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, 0, workers, is_master=True, wait_for_workers=False
    )
    return store, store.port


def _join_store(host: str, port: int, workers: int, timeout_s: float) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    wait = timedelta(seconds=timeout_s)
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
