"""Plan: the order of work, what each step reads, writes and holds, and the proof that it fits, before anything runs.

Read `passes` (how a program is streamed), `cost` (what it holds), `plan` (the whole), `explain` (the plan in words).
"""
