"""The page of `vl2 demo`: a user of the same service as the HTTP API, that people see instead of programs.

    the browser --events--> talk --answering--> Service --> engine
    the browser <--view---- talk <--answering-- pieces of text, boxes

`talk` is what was said, `answering` asks the engine, `gallery` makes the files of pictures, `view` is what the page
shows of all that. Only `app` and `events` need gradio.
"""
