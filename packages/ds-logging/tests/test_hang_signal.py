"""Each test is a program of its own, since it changes the signals of its process."""

import signal

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no SIGUSR1")

START = """
import asyncio, faulthandler, os, signal, socket, sys, tempfile, threading, time
from ds_logging._hang.signals import SignalListener
came = threading.Event()
listener = SignalListener(signal.SIGUSR1, came.set)
def send():
    came.clear()
    os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_the_thread_is_woken_while_the_main_thread_runs_no_python(run_script):
    # The main thread waits inside C, which the signal does not interrupt, as in a collective: no handler runs there.
    run_script(
        START
        + """
assert listener.start()
order = []
signal.signal(signal.SIGUSR1, lambda *a: order.append("handler"))
signal.siginterrupt(signal.SIGUSR1, False)
thread = threading.Thread(target=lambda: (came.wait(20), order.append("woken"), os.write(w, b"x")))
r, w = os.pipe()
thread.start()
import ctypes
read = ctypes.CDLL(None).read
threading.Timer(0.2, send).start()
buffer = ctypes.create_string_buffer(1)
assert read(r, buffer, 1) == 1
thread.join(20)
assert order == ["woken", "handler"], order
"""
    )


def test_the_default_is_restored(run_script):
    run_script(
        START
        + """
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
for _ in range(2):
    assert listener.start()
    assert listener.start()
    send()  # would end the process otherwise
    assert came.wait(20)
    listener.stop()
    listener.stop()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
"""
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_the_application_runs_and_stays(run_script, when):
    run_script(
        START
        + f"""
when = {when!r}
calls = []
def mine(number, frame):
    calls.append(number)
if when == "before":
    signal.signal(signal.SIGUSR1, mine)
assert listener.start()
if when == "after":
    signal.signal(signal.SIGUSR1, mine)
assert signal.getsignal(signal.SIGUSR1) is mine
send()
assert came.wait(20)
deadline = time.monotonic() + 20
while not calls and time.monotonic() < deadline:
    time.sleep(0.01)
assert calls == [signal.SIGUSR1]
listener.stop()
assert signal.getsignal(signal.SIGUSR1) is mine
"""
    )


def test_an_ignored_signal_is_ignored_again(run_script):
    run_script(
        START
        + """
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
assert listener.start()
send()
assert came.wait(20)
listener.stop()
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
"""
    )


def test_an_earlier_wakeup_descriptor_gets_its_bytes_and_is_restored(run_script):
    run_script(
        START
        + """
r, w = socket.socketpair()
w.setblocking(False)
r.settimeout(20)
signal.set_wakeup_fd(w.fileno())
signal.signal(signal.SIGUSR2, lambda *a: None)
assert listener.start()
send()
assert came.wait(20)
assert r.recv(1) == bytes([signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR2)
assert r.recv(1) == bytes([signal.SIGUSR2])
listener.stop()
assert signal.set_wakeup_fd(-1) == w.fileno()
"""
    )


def test_a_later_wakeup_descriptor_stays(run_script):
    run_script(
        START
        + """
assert listener.start()
r, w = socket.socketpair()
w.setblocking(False)
signal.set_wakeup_fd(w.fileno())
listener.stop()
assert signal.set_wakeup_fd(-1) == w.fileno()
"""
    )


def test_asyncio_in_the_main_thread_goes_on(run_script):
    run_script(
        START
        + """
assert listener.start()
async def main():
    got = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, got.set)
    os.kill(os.getpid(), signal.SIGUSR2)
    await asyncio.wait_for(got.wait(), 20)
asyncio.run(main())
listener.stop()
"""
    )


def test_a_handler_in_c_is_left_alone_and_a_warning_says_so(run_script):
    done = run_script(
        START
        + """
with tempfile.TemporaryFile("w+") as file:
    faulthandler.register(signal.SIGUSR1, file=file)
    started = listener.start()
    assert started is (not sys.platform.startswith("linux")), started
    if not started:
        send()
        time.sleep(0.1)
        file.seek(0)
        assert "Current thread" in file.read()
"""
    )
    if "linux" in __import__("sys").platform:
        assert "other C code" in done.stderr


def test_off_the_main_thread_it_says_so(run_script):
    done = run_script(
        START
        + """
found = []
thread = threading.Thread(target=lambda: found.append(listener.start()))
thread.start()
thread.join()
assert found == [False]
"""
    )
    assert "main thread" in done.stderr


def test_a_forked_child_does_not_wake_its_parent(run_script):
    run_script(
        START
        + """
import warnings
assert listener.start()
r, w = os.pipe()
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # fork beside a thread
    child = os.fork()
if child == 0:
    assert signal.set_wakeup_fd(-1) == -1
    os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert not came.wait(0.2)
send()
assert came.wait(20)
listener.stop()
"""
    )
