"""The replicated state: a pure machine whose log is kept for ever.

commands.py      every command and query; the one list to edit for a new one
rows.py          what tables hold and answers show
kv catalog health session intention ca cluster    per resource: its commands with their effect, its queries
entry.py         the bytes of a log entry
store.py         applies entries, evaluates queries, dumps, loads, hashes
transaction.py   Tx (writes with undo) and View (reads that note what they depend on)
tables.py        the tables and what is derived from them      granules.py   names of what answers depend on
"""
