"""Runs commands one after another in one process, so that torch is imported once: a JSON line in, a JSON line out."""

import contextlib
import io
import json
import os
import sys
import traceback

from early_exit_cli.cli.app import main

answers = sys.stdout
requests = sys.stdin
for line in requests:
    request = json.loads(line)
    os.environ.update(request["environment"])
    sys.argv = ["eexit", *request["arguments"]]
    sys.stdin = io.StringIO(request["stdin"])
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
    answers.flush()
