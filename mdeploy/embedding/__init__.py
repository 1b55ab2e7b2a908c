"""A client of embedding services: texts of any number go out, vectors come home in order and survive a crash.

types     what is asked and what comes back                              (pure)
client    one request; patience with a server that restarts              (httpx)
split     a batch that is refused is halved until the guilty text is known
lines     texts of a file, one a line                                    (files)
sinks     .npy and .jsonl, written so that a killed run can go on        (files)
stream    texts -> several requests at once -> sink, in order            (threads)
golden    vectors that are known to be right                             (files)
selftest  is the service what it says it is?

It speaks OpenAI's API and knows nothing of how a service is built or started.
"""
