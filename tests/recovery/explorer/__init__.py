"""A seeded explorer of schedules: the real code, in one process, on a virtual clock, cut off and struck anywhere.

The model. A `World` (world.py) holds processes: schedulers, workers, the children that workers fork, web requests and
operators. Each has one or more actors, threads of which exactly one runs at a time: it holds the baton. Before every
statement to the database and every command to Redis, before every sleep and before it ends, an actor is at a *cut*
(seams.py). There the chooser (chooser.py) may decide something: that somebody else goes first, or that one of the
faults strikes (faults.py). Between two cuts nothing can be seen from outside, so cutting before each of them is cutting
before and after each write. What runs is the library itself: its tick, sweeps, pushes, claims, worker, heartbeat and
jobs (processes.py, cast.py) over a real Redis and a real database.

A decision hangs on a cut by the actor's name and the number of the cut, so a trace is a list of decisions, every part
of a trace is a trace too, and a failing one is shortened by leaving decisions out (shrink.py). After each commit
and at the end, what must hold is checked from outside, by own queries (invariants.py). When the decisions are over, the
faults end, everything runs on fairly, and every row has to be ready within a bound of virtual time.

Scheduling decisions ("turn") and faults are of one kind. Where none is made, the actor at the cut goes on; when it
waits or ends, whoever has waited longest is next; when nobody can do anything, the time comes at which somebody can.
So time passes in sleeps and while a process is frozen, and nobody starves.

What is not the real thing, and is tested by real processes in the other recovery tests: fork, signals, the blocking
pop (it wakes up as one would), the interpreter's watchdog, and a server that is away (its calls fail where they are
made). The present is read when a statement is made and not when it is executed, as on SQLite.

To add a fault, write a function in faults.py: its docstring says what it is, its decorator how often it strikes and how
its argument is drawn. Read in the table of `make chaos` how often it really did. To add a promise, write it down in
invariants.py, and plant a bug in planted.py that breaks it.
"""
