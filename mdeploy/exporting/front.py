"""`mdeploy export nginx`: which servers, which keys, which port; then nginx itself is asked whether it agrees."""

from __future__ import annotations

import dataclasses
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UsageError
from mdeploy.export import address, nginx
from mdeploy.export.address import Address
from mdeploy.export.nginx import Guard, Site, Tls
from mdeploy.export.rendered import Rendered
from mdeploy.exporting import known, writing
from mdeploy.paths import expand
from mdeploy.settings import Settings
from mdeploy.specs import Say, ServiceSpec

_CONFIGURATION = """pid {directory}/nginx.pid;
error_log stderr warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/site.conf;
}}
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. `servers` are addresses or names of services on this machine, beside the service itself.

    `only_servers` leaves the service itself out, `insecure` says that everybody may come in.
    """

    service: str
    servers: tuple[str, ...] = ()
    listen: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    guard: Guard = "pass"
    only_servers: bool = False
    insecure: bool = False
    output: Path | None = None


def site(settings: Settings, request: Request, say: Say) -> Site:
    """The site that was asked for. Raises what is wrong with it."""
    spec = known.spec_of(settings, request.service)
    known.check_kind(spec)
    replicas = [known.spec_of(settings, name) for name in request.servers if ":" not in name]
    others = [address.server(text) for text in request.servers if ":" in text]
    _check_alike(spec, replicas)
    own = [] if request.only_servers else [spec]
    tls = _tls(request, say)
    usual = ("443",) if tls else ("80",)
    found = Site(
        service=spec.name,
        kind="llm" if spec.is_vllm else "app",
        servers=(*(_address(one) for one in (*own, *replicas)), *others),
        listen=tuple(dict.fromkeys(address.listen(text) for text in request.listen or usual)),
        names=request.names,
        tls=tls,
        max_body_bytes=nginx.DEFAULT_BODY_BYTES if spec.is_vllm else known.app_options(spec).max_body_bytes,
        guard=request.guard,
        key_file=str(_key_file(request)) if request.guard != "pass" else "",
        keys=_keys(spec) if request.guard != "pass" else (),
    )
    nginx.check(found)
    _check_listen(found, (*own, *replicas))
    _check_exposed(found, request, has_key=bool(spec.secrets))
    return found


def files(found: Site, output: Path) -> tuple[Rendered, ...]:
    """The site, and the include with the keys where it needs one."""
    main = Rendered(output.name, nginx.render(found))
    return (main,) if found.guard == "pass" else (keys(found), main)


def keys(found: Site) -> Rendered:
    """The include with the keys: only its owner, the master of nginx, may read it."""
    return Rendered(Path(found.key_file).name, nginx.render_keys(found), 0o600)


def write(found: Site, output: Path) -> tuple[Path, ...]:
    """Write the site and its keys."""
    whole = expand(output)
    return writing.write(files(found, whole), whole.parent)


def check(found: Site, say: Say) -> None:
    """Have nginx read the site, keys included; only said where there is no nginx. Raises ConfigError."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        say("not checked: nginx is not installed here (apt install nginx)")
        return
    with tempfile.TemporaryDirectory(prefix="mdeploy-nginx-") as name:
        directory = Path(name)
        there = dataclasses.replace(found, key_file=str(directory / "site.key"))
        writing.write(files(there, directory / "site.conf"), directory)
        (directory / "nginx.conf").write_text(_CONFIGURATION.format(directory=directory), encoding="utf-8")
        command = [program, "-t", "-p", name, "-c", str(directory / "nginx.conf")]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n  ".join(line for line in done.stderr.splitlines() if "[emerg]" in line) or done.stderr.strip()
        raise ConfigError(f"nginx refuses the site:\n  {said}", hint=_mends(said))
    say("nginx -t: the site is valid")


def _mends(said: str) -> str:
    if "host not found" in said:
        return "nginx looks hosts up when it starts: mend the name, or use an address"
    if "Permission denied" in said and os.geteuid():
        return "try it as root: sudo mdeploy export nginx …"
    return "the lines above say what to change"


# servers


def _address(spec: ServiceSpec) -> Address:
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(spec.host, spec.host)
    return address.server(f"[{host}]:{spec.port}" if ":" in host else f"{host}:{spec.port}")


def _check_alike(spec: ServiceSpec, replicas: Sequence[ServiceSpec]) -> None:
    """Replicas that answer differently would fail every other request."""
    for other in replicas:
        if (other.kind, other.model) != (spec.kind, spec.model):
            hint = "give each a site of its own"
            raise UsageError(f"{other.name} serves {other.model}, {spec.name} {spec.model}: no replicas", hint=hint)
        if set(known.keys_of(other)) != set(known.keys_of(spec)):
            hint = f"mdeploy keys rotate {other.name} --stdin < the key of {spec.name}"
            raise ConfigError(f"{other.name} and {spec.name} ask for different keys", hint=hint)


def _check_listen(found: Site, specs: Sequence[ServiceSpec]) -> None:
    for own in found.listen:
        for spec in specs:
            other = Address(spec.host, spec.port)
            if own.port == spec.port and (own.is_any or other.is_any or own.host == spec.host):
                raise UsageError(f"--listen {own}: {spec.name} listens there", hint="choose another port with --listen")


# keys


def _keys(spec: ServiceSpec) -> tuple[str, ...]:
    found = known.keys_of(spec)
    if not found:
        raise ConfigError(f"{spec.name} asks for no key", hint=f"mdeploy keys add {spec.name}")
    return found


def _key_file(request: Request) -> Path:
    """Beside the site, where no wildcard include of nginx (`*`, `*.conf`) takes it for a site."""
    if request.output is None:
        flag = "--add-key" if request.guard == "add" else "--key-from-service"
        raise UsageError(f"{flag} needs -o: keys go into a file of their own, never onto the screen", hint="-o FILE")
    whole = expand(request.output)
    if whole.suffix == ".key":
        raise UsageError(f"-o {request.output}: the file of that name is for the keys", hint="-o FILE.conf")
    return whole.with_suffix(".key") if whole.suffix else whole.with_name(f".{whole.name}.key")


def _check_exposed(found: Site, request: Request, *, has_key: bool) -> None:
    public = [one for one in found.listen if not one.is_private]
    if request.insecure or not public or (has_key and found.guard != "add"):
        return
    why = "nginx adds the key for everybody" if has_key else f"{found.service} asks for no key"
    hint = "--insecure, or --listen 127.0.0.1:PORT" + ("" if has_key else f", or mdeploy keys add {found.service}")
    raise UsageError(f"{public[0]} can be reached from other machines, and {why}", hint=hint)


# certificates


def _tls(request: Request, say: Say) -> Tls | None:
    if request.certificate is None and request.key is None:
        return None
    if request.certificate is None or request.key is None:
        raise UsageError("a certificate and its key belong together", hint="--tls-cert FILE --tls-key FILE")
    certificate, key = expand(request.certificate), expand(request.key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except FileNotFoundError as error:
        missing = certificate if not certificate.exists() else key
        raise NotFoundError(f"there is no {missing}", hint="--tls-cert fullchain.pem --tls-key privkey.pem") from error
    except PermissionError:
        say(f"not checked: {certificate} and {key} may not both be read; nginx reads them as root")
    except (ssl.SSLError, ValueError) as error:
        what = getattr(error, "reason", None) or str(error)
        hint = f"openssl x509 -noout -text -in {certificate}"
        raise ConfigError(f"{certificate} and {key} are no certificate with its key: {what}", hint=hint) from error
    except OSError as error:
        raise MdeployError(f"{certificate}, {key}: {error.strerror}") from error
    return Tls(str(certificate), str(key))
