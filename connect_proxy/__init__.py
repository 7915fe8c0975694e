"""The data plane: one small process that puts an application into the mesh.

    run          flags, signals, composition            source, adhoc   where snapshots come from
    snapshot     ProxySnapshot: all that it needs       serve           listeners, links, what a new snapshot changes
    session      one connection's life, without IO      inbound         who may come in     outbound   where to go
    relay        two sockets and the bytes              balance         which endpoint      tls        TLS, without IO
    loop         one thread, one epoll, fair turns      admin, log      /stats and lines

Imports neither agent nor server, nor anything large: it starts in a tenth of a second and stays below 30 MB.
"""
