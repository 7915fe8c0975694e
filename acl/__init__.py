"""Who is it, and what may it do. Pure: values in, decisions out.

authorizer.py   the questions that commands and queries ask, and the answer while ACLs are off
identity.py     SPIFFE identities of services and agents: parse, format
intention.py    which intention decides whether a service may connect to another, and why
"""
