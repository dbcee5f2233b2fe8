"""Speed and memory of the server, beside the same work by hand with torch + PEFT: `make bench`, `python -m bench`.

One module a measurement in `bench/measurements`; add one there and name it in its `ALL`. `docs/performance.md` says
what is measured and how.
"""
