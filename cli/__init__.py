"""The command line: an HTTP client of the agent with Consul's grammar, and the door to the three programs.

    main.py      the table of nouns; exit codes; nothing heavy is imported before the noun is known
    command.py   what a command is: its flags, its arguments, its help text
    api.py       the HTTP client (http.client)          output.py   tables and JSON as Consul prints them
    agent.py server.py connect.py                       programs, whose modules are imported when they run
    members.py catalog.py kv.py services.py intention.py info.py version.py keygen.py validate.py force_leave.py
    operator.py                                                        one file per noun

It imports `rostra.agent.config` in three places, all inside functions: the help of the programs, `validate`, and
`services register FILE`. Everything else that it knows, it asks the agent over HTTP.
"""
