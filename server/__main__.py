"""`python -P -m rostra.server -lifeline-fd N`: the core as a child of the agent."""

from rostra.server.run import main_child

if __name__ == "__main__":
    main_child()
