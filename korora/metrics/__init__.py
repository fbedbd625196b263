"""Metrics: what is counted, who counts it, how processes share it, and the listener that gives it out.

A supervisor with workers, each a process of its own (spawned or forked, as it likes):

    supervisor   directory = SharedDirectory.prepare(parent)                before the first worker
                 observer = Observer(Instruments.shared(directory.path, "supervisor"), Side.SUPERVISOR, "supervisor")
                 server = MetricsServer(Pages(shared_registry(directory.path), health, ready, status))
                 await server.start(listen_tcp(*METRICS_ADDRESS, "the metrics"))
                 sample_for_ever(observer, lambda: ()) as a task; workers, ready, draining, reloaded, worker_restarted
    worker "0"   observer = Observer(Instruments.shared(path, "0"), Side.WORKER, "0")           after the fork, if any
                 sample_for_ever(observer, statuses) as a task; session_begun, session_ended, peer_refused, identity
    supervisor   worker "0" was reaped: directory.forget("0"), observer.session_died for each of its sessions; then it
                 may be started again, under the same name
                 at the end: await server.close(); directory.close()

One process: ``instruments = Instruments.alone()``, ``Observer(instruments)``, ``Pages(instruments.registry(), …)``.
No environment variable is needed, and it does not matter when prometheus-client is imported first.
"""
