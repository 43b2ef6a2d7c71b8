"""The innermost side of helpers.answers.sandbox: the process that runs generated code.

sandbox_supervisor.py hands this text to `python -I -S -c`; nothing imports it. Standard input
brings the program, or a solution, its tests and the token that goes back when both have ended.
"""

import _thread
import builtins
import collections
import itertools
import json
import operator
import os
import signal
import sys
import types


def run_program(finished: int):
    """Run a program as `__main__`, or a solution and its tests, as standard input says."""
    os.environ["TMPDIR"] = os.getcwd()  # the loader drops it where real and effective user differ
    program, tests, token = json.loads(sys.stdin.read())
    name = "__main__" if tests is None else "solution"
    module = sys.modules[name] = types.ModuleType(name)
    if tests is None:
        os.close(finished)
        exec(compile(program, "<program>", "exec"), module.__dict__)
    else:
        judge(module.__dict__, program, tests, token.encode(), finished)


def judge(names: dict, solution: str, tests: str, token: bytes, finished: int):
    """Run solution and tests, and write the token when both came to their end.

    The token is a local of the main thread, which runs nothing of the solution: no frame that the
    solution can walk to holds it. Between the end of the tests and the lock stands no Python
    code, so there is no function that a solution could call to get there early.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # or a solution could interrupt the main thread
    # The main thread looks up no name after the start: a solution may replace what names mean.
    write, leave = os.write, os._exit
    lock = _thread.allocate_lock()
    lock.acquire()
    test_names = {"__name__": "tests", "__builtins__": dict(vars(builtins))}
    steps = [
        (exec, compile(solution, "<solution>", "exec"), names),
        (copy_names, names, test_names),
        (exec, compile(tests, "<tests>", "exec"), test_names),
        (lock.release,),
    ]
    sys.addaudithook(refuse_inspection)
    _thread.start_new_thread(run_steps, ([itertools.starmap(operator.call, steps)],))
    del steps
    lock.acquire()
    write(finished, token)
    leave(0)


def run_steps(holder: list):
    """Run the steps. They leave `holder` first: a frame shows its names, not what it works on."""
    show, leave = sys.__excepthook__, os._exit  # as they are before the solution runs
    try:
        collections.deque(holder.pop(), 0)
    except BaseException as error:
        try:
            show(type(error), error, error.__traceback__)
        finally:
            leave(1)


def copy_names(names: dict, test_names: dict):
    """Give the tests what the solution defined, without what would stand in for a builtin."""
    known = {*test_names, *test_names["__builtins__"]}
    test_names.update({name: value for name, value in names.items() if name not in known})


def refuse_inspection(event: str, arguments: tuple):
    """Audit hook: no look at other threads' frames, at all objects, or at raw memory."""
    if event.startswith("ctypes.") or event in {
        "gc.get_objects",
        "gc.get_referents",
        "gc.get_referrers",
        "sys._current_exceptions",
        "sys._current_frames",
        "sys.monitoring.register_callback",
        "sys.setprofile",
        "sys.settrace",
    }:
        raise RuntimeError(f"{event} is not available to a solution under test")


if __name__ == "__main__":
    run_program(int(sys.argv[1]))
