"""The application: the page, its setup, runs that answer line by line, and stopping them."""
# Annotations are not postponed here: FastAPI reads them when the application is made, in functions that import it.

import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.core.errors import WorkbenchError
from workbench.core.records import to_jsonable
from workbench.serve.ask import Ask
from workbench.serve.desk import Desk
from workbench.serve.export import generate_command, packed_edits, python_block, save_edits
from workbench.serve.guard import Guard, GuardedApp
from workbench.serve.page import playground_page
from workbench.serve.playground import Playground
from workbench.serve.reading import active_features

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_NAME = 64
"""Characters of the name of a run that count."""
PART_BYTES = 2**20
"""Bytes of a file that are read at once."""


def playground_app(
    playground: Playground, guard: Guard, desk: Desk, index: Mapping[str, object] | None = None, out: Path | None = None
) -> GuardedApp:
    """An ASGI application for one playground; only requests that the guard allows reach it.

    The desk makes the runs and is closed with the application. `index` holds the features that can be searched, as the
    feature page packs them. Interventions are saved in folders of `out`; without it nothing is written.
    """
    from fastapi import FastAPI

    @contextlib.asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    _add_page(app, playground, guard, index)
    _add_runs(app, playground, desk)
    _add_exports(app, playground, desk, out)
    return GuardedApp(app, guard)


def _add_page(app: "FastAPI", playground: Playground, guard: Guard, index: Mapping[str, object] | None) -> None:
    from fastapi import Response

    page = playground_page(playground.model.name)
    setup = _json({"about": playground.about, "index": index})

    @app.get("/")
    def show(token: str | None = None) -> Response:
        answer = Response(page.html, media_type="text/html")
        answer.headers["Content-Security-Policy"] = page.policy
        if token is not None:
            # The guard allowed the request, so the token is right or the cookie was there already.
            answer.set_cookie(guard.cookie, guard.token, httponly=True, samesite="strict", path="/")
        return answer

    @app.get("/api/setup")
    def about() -> Response:
        return Response(setup, media_type="application/json")


def _add_runs(app: "FastAPI", playground: Playground, desk: Desk) -> None:
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException

    @app.exception_handler(WorkbenchError)
    def refuse(_request: Request, error: WorkbenchError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(RequestValidationError)
    def refuse_form(_request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return JSONResponse({"error": f"{wrong}. Send a JSON object as the page does."}, 400)

    @app.exception_handler(HTTPException)
    def refuse_request(_request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{error.detail}. Send what the page sends."}, error.status_code)

    @app.get("/api/feature")
    async def feature(number: int) -> Response:
        return Response(_json(await desk.call(lambda: playground.lens(number))), media_type="application/json")

    @app.post("/api/active")
    async def active(asked: dict[str, object]) -> Response:
        ask = Ask.read(asked)
        found = await desk.call(lambda: active_features(playground, ask))
        return Response(_json(found), media_type="application/json")

    @app.post("/api/run")
    async def run(asked: dict[str, object], name: str) -> StreamingResponse:
        ask = Ask.read(asked)
        playground.check(ask)
        events = desk.events(name[:MAX_NAME], lambda emit, stopped: playground.run(ask, emit, stopped))
        # The first event is awaited here, so that a run that can't begin is refused with a status.
        first = await anext(events)

        async def lines() -> AsyncIterator[str]:
            try:
                yield _json(first) + "\n"
                async for event in events:
                    yield _json(event) + "\n"
            finally:
                await events.aclose()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.post("/api/stop")
    def stop(name: str) -> dict[str, bool]:
        return {"stopped": desk.stop(name[:MAX_NAME])}


def _add_exports(app: "FastAPI", playground: Playground, desk: Desk, out: Path | None) -> None:
    from fastapi.responses import StreamingResponse

    @app.post("/api/python")
    def python(asked: dict[str, object]) -> dict[str, str]:
        return {"code": python_block(playground, Ask.read(asked))}

    @app.post("/api/save")
    async def save(asked: dict[str, object]) -> dict[str, str]:
        ask = Ask.read(asked)
        folder = await desk.call(lambda: save_edits(playground, ask, out))
        return {"folder": str(folder), "command": generate_command(playground, ask, folder)}

    @app.post("/api/download")
    async def download(asked: dict[str, object]) -> StreamingResponse:
        ask = Ask.read(asked)
        name, file = await desk.call(lambda: packed_edits(playground, ask))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(size)}

        def parts() -> Iterator[bytes]:
            with file:
                while part := file.read(PART_BYTES):
                    yield part

        return StreamingResponse(parts(), media_type="application/zip", headers=headers)


def _json(value: object) -> str:
    """Strict JSON in ASCII, which holds half a character too."""
    return json.dumps(to_jsonable(value), allow_nan=False)
