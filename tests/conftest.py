"""What every test can rely on, however the tests were started."""

from __future__ import annotations

import signal

# In the background of a script, or under nohup, they are ignored: by what the tests start, too
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
