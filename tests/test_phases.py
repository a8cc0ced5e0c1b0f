"""Where time goes: the stopwatch, what waits for the device, and what is read ahead."""

import collections
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import Grid, reader
from jgptq.phases import Phases
from jgptq.reader import Reader
from jgptq.report import read_report, report_json

GRID = Grid(bits=4, group_size=8)
KEY = (0, ((0, 1),))


def mlp(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def weights(depth):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((16, 16)).astype(np.float32) for _ in range(depth)]


def batches():
    return [np.random.default_rng(seed).standard_normal((40, 16)).astype(np.float32) for seed in range(3)]


def quantize(params, **settings):
    return jgptq.quantize(mlp, params, batches(), grid=GRID, **({"method": "rtn"} | settings))


class Lazy:
    """A leaf on disk, as far as quantize can tell, that notes when and in which thread it is read."""

    def __init__(self, array, log, name):
        self.array, self.log, self.name = array, log, name
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, index):
        self.log.append((self.name, threading.current_thread() is threading.main_thread()))
        return self.array[index]


def lazy(depth):
    log = []
    return [Lazy(array, log, number) for number, array in enumerate(weights(depth))], log


def test_an_inner_phase_is_not_the_outer_ones(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = Phases(measured=True)
    with phases("outer"), phases("inner"):
        pass
    assert dict(phases.seconds) == {"outer": 1.0 + 5.0, "inner": 3.0}


def test_compiling_is_a_phase_wherever_it_happens():
    phases = Phases(measured=True)
    with phases.watching(), phases("work"):
        phases.wait(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))))
    seconds = dict(phases.seconds)
    assert set(seconds) == {"work", "compile"}
    assert seconds["compile"] > seconds["work"] > 0


def test_events_inside_others_count_once(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    phases = Phases(measured=True)
    with phases.watching(), phases("work"):
        for at, seconds in ((11.0, 1.0), (14.0, 4.0), (16.0, 1.0)):  # the second from 10 on, around the first
            now[0] = at
            jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
        now[0] = 20.0
    assert dict(phases.seconds) == {"compile": 5.0, "work": 5.0}


def test_phases_add_up_to_the_whole_and_nothing_is_left_listening(monkeypatch):
    listening = []
    for name, note in (
        ("register_event_duration_secs_listener", listening.append),
        ("unregister_event_duration_listener", listening.remove),
    ):
        real = getattr(jax.monitoring, name)
        monkeypatch.setattr(jax.monitoring, name, lambda listen, real=real, note=note: (real(listen), note(listen)))
    started = time.perf_counter()
    _, report = quantize(weights(2), profile=True)
    whole = time.perf_counter() - started
    profile = dict(report.profile)
    assert {"trace", "compile", "advance", "hessian", "solve", "pack", "other"} <= set(profile)
    assert 0.9 * whole <= sum(profile.values()) <= whole
    assert [seconds for _, seconds in report.profile] == sorted(profile.values(), reverse=True)
    assert listening == []


def test_without_profile_there_is_none_and_the_weights_are_the_same():
    plain, report = quantize(weights(2))
    measured, _ = quantize(weights(2), profile=True)
    assert report.profile == ()
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(measured), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_profile_survives_the_report_as_json():
    _, report = quantize(weights(1), profile=True)
    assert read_report(report_json(report)).profile == report.profile


@pytest.mark.parametrize(
    "method", ["rtn", jgptq.GPTQ(scale_search=None, sweeps=0)], ids=["one model", "the float model followed"]
)
def test_the_host_waits_for_the_device_once_a_step(method, monkeypatch):
    waits = []

    def counting(name, function):
        def counted(*arguments):
            before = len(waits)
            result = function(*arguments)
            waits[before:] = [name]  # and not the values that it reads
            return result

        monkeypatch.setattr(jax, name, counted)

    counting("device_get", jax.device_get)
    counting("block_until_ready", jax.block_until_ready)
    array = type(jnp.zeros(1))
    value = array._value
    monkeypatch.setattr(array, "_value", property(lambda self: waits.append("a value read") or value.fget(self)))
    found = {}
    for depth in (2, 5):
        waits.clear()
        quantize(weights(depth), method=method)
        found[depth] = collections.Counter(waits)
    assert found[5] - found[2] == {"device_get": 3}
    assert found[5]["block_until_ready"] == 0


def test_the_next_steps_weights_are_read_ahead_and_once():
    params, log = lazy(4)
    packed, _ = quantize(params)
    expected, _ = quantize(weights(4))
    assert log[0] == (0, True)  # nothing was computed yet
    assert log[1:] == [(1, False), (2, False), (3, False)]
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_more_than_the_next_step_is_read_ahead():
    params, log = lazy(4)
    seen = []
    quantize(params, progress=lambda row, done, total: time.sleep(0.05) or seen.append(max(name for name, _ in log)))
    assert seen == [1, 2, 3, 3]


def test_a_weight_that_cannot_be_read_stops_where_it_is_needed():
    params, _ = lazy(3)
    rows = []

    class Broken(Lazy):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

    params[1] = Broken(params[1].array, [], 1)
    threads = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        quantize(params, progress=lambda row, *_: rows.append(row.path))
    assert rows == ["0"]
    assert threading.active_count() == threads


def test_an_interrupted_run_leaves_no_thread():
    params, _ = lazy(3)

    def interrupt(*_):
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        quantize(params, progress=interrupt)
    assert threading.active_count() == threads


def test_a_reader_never_reads_two_things_at_once():
    inside, most = [], []

    def read():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return "value"

    with Reader() as ahead:
        ahead.start({(number, ()): read for number in range(3)})
        assert [ahead.take((number, ()), read) for number in (2, 7, 0)] == ["value"] * 3
    assert max(most) == 1


def test_what_nobody_took_is_dropped_and_read_again_when_asked_for():
    with Reader() as ahead:
        ahead.start({KEY: lambda: "old"})
        ahead.start({})
        assert ahead.take(KEY, lambda: "new") == "new"
    assert reader.Reader().take(KEY, lambda: 1) == 1
