"""The command serve: the playground on this machine."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli.base import typed
from workbench.cli.features_show import load_cards
from workbench.cli.places import sae_folder
from workbench.cli.saes import SAECommand
from workbench.core.errors import InvalidInputError

if TYPE_CHECKING:
    from types import FrameType

    from workbench.bases.sae import SAELike
    from workbench.features.card import FeatureCard
    from workbench.models.model import Model
    from workbench.serve.playground import Playground


@dataclass(frozen=True, kw_only=True)
class Serve(SAECommand):
    """Open the playground: write with SAE features edited.

    The browser shows the edited text beside the unedited one and a control. Ctrl-C stops it.

    Example: workbench serve --sae sae
    """

    sae: str | None = None
    """SAE: its folder, a run that holds one, or release/sae_id of sae_lens; none shows texts and log-probabilities."""
    features: Path | None = None
    """Folder of feature cards or of a feature table, to search; by default what is in the SAE's folder."""
    out: Path | None = None
    """Folder for the interventions that the page saves, a folder each; without it the page only lets
    them be downloaded."""
    no_check: bool = False
    """Serve an SAE that does not fit the model's activations too."""
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs --allow-network."""
    port: int = 0
    """Port to listen at; 0 takes a free one."""
    allow_network: bool = False
    """Let other machines reach the server; whoever has the token can use it, and what is sent is not encrypted."""

    def run(self) -> None:
        """Serves until Ctrl-C."""
        from workbench.serve.playground import Playground

        listener = listen(self.host, self.port, self.allow_network)
        with listener:
            model = self.load()
            playground = Playground(model, self._sae(model), self._sae_source())
            self._serve(playground, self._index(playground), listener)

    def sae_path(self) -> Path | None:
        """Folder of the SAE; of a release of sae_lens what was typed."""
        return None if self.sae is None else sae_folder(Path(self.sae))

    def _sae(self, model: Model) -> SAELike | None:
        from workbench.saes.formats.load import load_sae

        path, check = self.sae_path(), not self.no_check
        return None if path is None else load_sae(path, device=model.device, model=model, check=check)

    def _sae_source(self) -> str | None:
        path = self.sae_path()
        return None if path is None else str(path.resolve() if path.exists() else path)

    def _index(self, playground: Playground) -> Mapping[str, object] | None:
        from workbench.serve.index import feature_index

        return None if playground.sae is None else feature_index(playground, self._cards(playground))

    def _cards(self, playground: Playground) -> Iterable[FeatureCard] | None:
        from workbench.core.errors import MissingFileError
        from workbench.features.cards.tablecards import complete_cards
        from workbench.features.scores.origin import origin, require_same_origin

        folder = self.features or self.sae_path() or Path()
        try:
            cards, table, meta = load_cards(folder)
        except MissingFileError:
            if self.features is not None:
                raise
            return None
        assert playground.sae is not None
        require_same_origin(str(folder), meta, origin(playground.model, playground.sae, playground.site))
        return cards if table is None else complete_cards(cards, table)

    def _serve(self, playground: Playground, index: Mapping[str, object] | None, listener: socket.socket) -> None:
        import uvicorn

        from workbench.serve.app import playground_app
        from workbench.serve.desk import Desk
        from workbench.serve.guard import Guard, is_loopback

        host, port = listener.getsockname()[:2]
        guard = Guard(secrets.token_urlsafe(32), port, open=not is_loopback(host))
        desk = Desk()

        def greet() -> None:
            self._greet(playground, address(host, port, guard.token), guard.open)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:  # from here on the address answers
                    greet()

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                # First of all, because the server waits for the answers that are being given.
                desk.stop_all()
                super().handle_exit(sig, frame)

        config = uvicorn.Config(
            playground_app(playground, guard, desk, index, self.out), log_level="warning", access_log=False, ws="none",
            server_header=False, timeout_graceful_shutdown=10,
        )  # fmt: skip
        # Raised after the runs have ended, and not at all where the process was started with SIGINT ignored.
        with contextlib.suppress(KeyboardInterrupt):
            Server(config).run(sockets=[listener])
        # With --json the address was the one object that is printed.
        if not self.json:
            self.emit({}, ["Stopped."])

    def _greet(self, playground: Playground, url: str, is_open: bool) -> None:
        about = playground.about
        warning = [
            "Other machines can reach this. Whoever has the address below can use the model; nothing is encrypted."
        ]
        lines = [f"Playground of {about['model']}" + (f", SAE at {about['site']}." if about["site"] else "."), url]
        said = {"url": url, "model": about["model"], "site": about["site"], "open": is_open}
        self.emit(said, [*warning * is_open, *lines, "Ctrl-C stops it."], self._following())

    def _following(self) -> str | None:
        """What shows all features: cards if there are none to search yet, else their page."""
        from workbench.saes.home import SAEHome

        path = self.sae_path()
        if path is None or not path.is_dir():
            return None
        return typed("features", "show" if SAEHome(path).cards.is_dir() else "cards", self.sae)


def listen(host: str, port: int, allow_network: bool) -> socket.socket:
    """A socket that listens, found before anything is loaded.

    Raises:
        InvalidInputError: for an address that other machines reach without leave, or one that can't be had.
    """
    from workbench.serve.guard import is_loopback

    if not is_loopback(host) and not allow_network:
        raise InvalidInputError(
            f"--host {host}: other machines could reach this server and, with the token, use the model. Leave --host "
            "out and use a tunnel (ssh -L), or add --allow-network if that is meant."
        )
    if not 0 <= port <= 65535:
        raise InvalidInputError(f"--port {port}: ports are 0 to 65535; 0 takes a free one.")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise InvalidInputError(
            f"--host {host} --port {port}: {error.strerror or error}. Choose another port; 0 takes a free one."
        ) from error
    return found


def address(host: str, port: int, token: str) -> str:
    """Where the page is, with the token.

    >>> address("::1", 8000, "t").split("//")[1]
    '[::1]:8000/?token=t'
    """
    name = f"[{host}]" if ":" in host else socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{name}:{port}/?token={token}"
