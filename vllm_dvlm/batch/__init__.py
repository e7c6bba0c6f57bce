"""`vllm-dvlm batch`: a file of questions in, a file of answers out, on one engine or on many.

`rows` reads and numbers lines, `ledger` knows which are done, `driver` keeps engines busy and writes; none of these
imports vLLM. `answerer` is one engine; `step_loop` the one of a CPU host, in the process itself.
"""
