"""The page of `vl2 demo`: a user of the same service as the HTTP API, that people see instead of programs.

    gradio's events --app--> Talk --answering--> Service --> engine
    the browser    <--app-- html <--answering-- pieces, boxes

`talk` is what was said, `answering` asks the engine, `gallery` makes the files of pictures, `html` is what the page
shows of all that; none of them needs gradio, which `app` alone imports.
"""
