"""A load tester on raw sockets that says how far its own numbers can be trusted.

control   ask the server: model, token counts, one trial request      (httpx)
request   one plain request, for servers that speak no tokens         (pure)
prompts   texts of a wanted length, no two alike
plan      options -> LoadPlan, all bytes serialised                   (pure)
load      start the workers, gather their reports                     (processes)
worker    one epoll loop; stream reads one answer, clock its times    (sockets)
audit     was it the server's time or ours?                           (pure)
report    samples -> BenchResult -> JSON or table                     (pure)
mock      a server that knows the truth, to measure the measurer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdeploy.bench.types import BenchOptions, BenchResult, BenchTarget

if TYPE_CHECKING:
    from mdeploy.bench.load import OnProgress


def run(target: BenchTarget, options: BenchOptions, on_progress: OnProgress | None = None) -> BenchResult:
    """Measure a server: ask, plan, load, judge. `on_progress` is called about twice a second.

    An interrupt during the load ends it early: the result holds what was measured and says so.
    Raises UsageError for impossible options, UnavailableError, NotReadyError, NotFoundError or
    ConfigError when the trial request tells that the load could not work.
    """
    from mdeploy.bench import load, plan, prompts, report
    from mdeploy.bench.control import Control

    plan.validate(options)
    with Control(target, options) as control:
        address = control.address()
        environment = control.environment()
        if options.endpoint == "http":
            work = plan.build_plain(target, control.request(), options, address)
        else:
            model = control.model()
            texts = prompts.build(options.input_tokens, options.seed, control.counter(model))
            ignore_eos = control.accepts(model, texts.text(-1))
            work = plan.build(target, model, options, texts, address, ignore_eos=ignore_eos)
    return report.result(work, load.run(work, on_progress), environment)
