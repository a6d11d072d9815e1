// Real programs for the interop tests: docker-registry, dockerd, containerd, squid and nginx,
// started by the tests on loopback, and the commands that load images. Each has its state in a
// temporary folder of its own, and ends with the test process, however that ends.
import assert from "node:assert/strict";
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { createPrivateKey } from "node:crypto";
import { once } from "node:events";
import {
  accessSync,
  chmodSync,
  closeSync,
  constants,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { type AddressInfo, createServer, type Socket } from "node:net";
import { arch, tmpdir } from "node:os";
import { delimiter, join, resolve } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { promisify } from "node:util";
import { type CommandOptions, runCommand } from "./command.ts";
import { digestOf, type TestContent } from "./image.ts";

/** In Go's words. */
export const HOST_ARCHITECTURE = arch() === "x64" ? "amd64" : arch();

// ====== Which programs there are ======

// Daemons live in sbin, which only root's PATH holds.
const SEARCH_PATH = [process.env.PATH ?? "", "/usr/local/sbin", "/usr/sbin", "/sbin"].join(
  delimiter,
);

function isInstalled(program: string): boolean {
  return SEARCH_PATH.split(delimiter).some((folder) => {
    try {
      accessSync(resolve(folder, program), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/**
 * For node:test's `skip`: why tests that need these programs (and root) can't run here, or false.
 * With IMGPULL_INTEROP=required, as CI sets it, throws instead: there nothing may be skipped.
 */
export function skipWithout(...programs: string[]): string | false {
  const missing = programs.filter((program) => !isInstalled(program));
  if (process.getuid?.() !== 0) missing.push("root's rights");
  if (missing.length === 0) return false;
  const reason = `missing here: ${missing.join(", ")}`;
  if (process.env.IMGPULL_INTEROP === "required")
    throw new Error(`IMGPULL_INTEROP=required, but ${reason}`);
  console.error(`\n*** INTEROP TESTS SKIPPED, ${reason} ***\n`);
  return reason;
}

// ====== Folders ======

let root: string | undefined;

/** A new folder for one program's state, removed when the test process exits. */
export function interopFolder(name: string): string {
  if (root === undefined) {
    const made = mkdtempSync(join(tmpdir(), "imgpull-interop-"));
    root = made;
    chmodSync(made, 0o755);
    process.once("exit", () => rmSync(made, { recursive: true, force: true, maxRetries: 3 }));
  }
  return mkdtempSync(join(root, `${name}-`));
}

// ====== Commands ======

export interface RunOptions {
  cwd?: string;
  env?: Record<string, string>;
  /** The guard against hanging, default 120 s. */
  guardMs?: number;
}

let home: string | undefined;

/**
 * None of this machine's settings: no proxy, no credentials; HOME, and the TMPDIR that skopeo
 * fills, are new.
 */
export function toolEnvironment(): Record<string, string> {
  home ??= interopFolder("home");
  return { PATH: SEARCH_PATH, HOME: home, TMPDIR: home, XDG_RUNTIME_DIR: home, LANG: "C.UTF-8" };
}

/**
 * Runs a program to its end and gives its stdout; a failure is an error with everything that it
 * printed.
 */
export async function run(command: readonly string[], options: RunOptions = {}): Promise<string> {
  const [program = "", ...args] = command;
  const running = promisify(execFile)(program, args, {
    cwd: options.cwd,
    env: { ...toolEnvironment(), ...options.env },
    timeout: options.guardMs ?? 120_000,
    killSignal: "SIGKILL",
    maxBuffer: 64 * 1024 * 1024,
  });
  running.child.stdin?.end();
  try {
    return (await running).stdout;
  } catch (failure) {
    const { stdout = "", stderr = "" } = failure as { stdout?: string; stderr?: string };
    throw new Error(`failed: ${command.join(" ")}\n${stdout}${stderr}`, { cause: failure });
  }
}

/** Runs the built command; it has to succeed. Gives what it printed. */
export async function imgpull(args: string[], options: CommandOptions = {}): Promise<string> {
  const { exitCode, stdout, stderr } = await runCommand(args, options);
  assert.equal(exitCode, 0, stderr);
  return stdout.toString();
}

// ====== Services ======

// The shell ends the service (and only it, by its pid) when a signal's name comes on its stdin, or
// when its stdin ends because the test process is gone, by SIGKILL too: no daemon outlives the
// tests. In the second case nobody else tidies up: it removes the service's folder and, as the last
// of them, the folder of all. What lies in /dev/shm it removes in both.
const GUARDIAN = `
default=$1 folder=$2 shared=$3; shift 3
exec 3<&0
"$@" </dev/null 3<&- & service=$!
touch "$folder/alive"
{ read -r signal || touch "$folder/orphaned"; kill -s "\${signal:-$default}" "$service"; } <&3 2>/dev/null & guard=$!
exec 3<&-
wait "$service"; status=$?
kill "$guard" 2>/dev/null
[ -z "$shared" ] || rm -f /dev/shm/"$shared"-*
rm -f "$folder/alive"
[ -e "$folder/orphaned" ] || exit "$status"
cd / && rm -rf "$folder"
root=\${folder%/*}
set -- "$root"/*/alive
[ -e "$1" ] || rm -rf "$root"`;

export interface Program {
  name: string;
  folder: string;
  command: string[];
  /** What it prints once it takes connections. */
  ready: RegExp;
  stopSignal: NodeJS.Signals;
  /** How the names of what it leaves in /dev/shm begin, up to a "-". */
  sharedMemory?: string;
}

export class Service {
  readonly folder: string;
  readonly #program: Program;
  #child: ChildProcess | undefined;
  /** How much of the log is from earlier starts. */
  #logStart = 0;

  constructor(program: Program) {
    this.#program = program;
    this.folder = program.folder;
  }

  /** Returns when it takes connections. */
  async start(): Promise<RegExpMatchArray> {
    const { command, folder, ready, stopSignal, sharedMemory = "" } = this.#program;
    const logPath = join(folder, "output.log");
    const log = openSync(logPath, "a", 0o644);
    this.#logStart = readFileSync(logPath, "latin1").length;
    const guardian = ["-c", GUARDIAN, "guardian", stopSignal.slice(3), folder, sharedMemory];
    const child = spawn("sh", [...guardian, ...command], {
      stdio: ["pipe", log, log],
      env: toolEnvironment(),
      cwd: folder,
    });
    closeSync(log);
    this.#child = child;
    // A test file that forgets to stop a service ends all the same, and its end ends the service.
    child.unref();
    (child.stdin as Socket).unref();
    child.stdin?.on("error", () => {});
    return this.logged(ready);
  }

  get isRunning(): boolean {
    return (
      this.#child !== undefined && this.#child.exitCode === null && this.#child.signalCode === null
    );
  }

  /**
   * What it has printed since its last start, then its access log (squid, nginx), if it has one.
   */
  log(): string {
    const access = join(this.folder, "access.log");
    const printed = readFileSync(join(this.folder, "output.log"), "latin1").slice(this.#logStart);
    return printed + (existsSync(access) ? readFileSync(access, "latin1") : "");
  }

  /**
   * Waits until the log matches: programs write about a request only after they have answered it.
   */
  async logged(pattern: RegExp, guardMs = 60_000): Promise<RegExpMatchArray> {
    for (const end = Date.now() + guardMs; ; ) {
      const wasRunning = this.isRunning;
      const match = pattern.exec(this.log());
      if (match) return match;
      if (!wasRunning) throw new Error(`${this.#program.name} ended:\n${this.log().slice(-4000)}`);
      if (Date.now() > end)
        throw new Error(`${this.#program.name} didn't log ${pattern}:\n${this.log().slice(-4000)}`);
      await pause(20);
    }
  }

  /** Returns when it has ended. SIGKILL leaves it no time to finish what it sends. */
  async stop(signal: NodeJS.Signals = this.#program.stopSignal): Promise<void> {
    const child = this.#child;
    if (child === undefined || !this.isRunning) return;
    child.ref();
    const ended = once(child, "exit");
    child.stdin?.end(`${signal.slice(3)}\n`);
    await ended;
  }

  /** Stops it and starts it again: same port, same state. */
  async restart(signal?: NodeJS.Signals): Promise<void> {
    await this.stop(signal);
    await this.start();
  }
}

/** Files with these texts in a folder; gives back their paths. */
export function writeFiles<Name extends string>(
  folder: string,
  texts: Record<Name, string>,
): Record<Name, string> {
  const paths = {} as Record<Name, string>;
  for (const name of Object.keys(texts) as Name[]) {
    paths[name] = join(folder, name);
    writeFileSync(paths[name], texts[name]);
  }
  return paths;
}

/**
 * squid and nginx refuse port 0: takes one that is free now, and another if it was gone when they
 * came to listen.
 */
export async function startOnFreePort<Started extends Service>(
  make: (port: number) => Started,
): Promise<Started> {
  for (let attempt = 1; ; attempt++) {
    const probe = createServer().listen(0, "127.0.0.1");
    await once(probe, "listening");
    const { port } = probe.address() as AddressInfo;
    probe.close();
    await once(probe, "close");
    const service = make(port);
    try {
      await service.start();
      return service;
    } catch (failure) {
      await service.stop("SIGKILL");
      if (attempt === 3 || !/Address already in use|Cannot bind/i.test(String(failure)))
        throw failure;
    }
  }
}

export interface Account {
  user: string;
  password: string;
}

/** PEM texts; `clientCa` demands a client certificate that it has issued. */
export interface ServerTls {
  cert: string;
  key: string;
  clientCa?: string;
}

/** bcrypt, which docker-registry alone insists on. */
export function htpasswd(account: Account): Promise<string> {
  return run(["htpasswd", "-nbB", account.user, account.password]);
}

// ====== docker-registry ======

export interface RealRegistryOptions {
  htpasswd?: Account;
  tls?: ServerTls;
  /** A folder that outlives this registry; default its own. */
  storage?: string;
  /** Default: any free one. */
  port?: number;
  /** Default docker-registry; `registry` is distribution's third version. */
  program?: "docker-registry" | "registry";
  /** Sections of the configuration that take the place of these, or come beside them. */
  configuration?: Record<string, unknown>;
}

/** A GET of a blob that was answered. */
export interface ServedBlob {
  digest: string;
  status: number;
}

/**
 * Debian's docker-registry (distribution 2.8). `stop("SIGKILL")` drops what it sends; `restart()`
 * keeps its port.
 */
export class RealRegistry extends Service {
  port = 0;
  readonly storage: string;
  #takenLength = 0;

  constructor(program: Program, storage: string) {
    super(program);
    this.storage = storage;
  }

  /** `localhost:PORT`, for references. */
  get host(): string {
    return `localhost:${this.port}`;
  }

  /** What it has served since it was last asked, once no request is under way any more. */
  async takeServed(): Promise<ServedBlob[]> {
    for (const end = Date.now() + 60_000; ; await pause(20)) {
      const log = this.log();
      if (
        log.split('msg="authorizing request"').length ===
        log.split(/" \d{3} \d+ "[^"]*" "[^"]*"\n/).length
      ) {
        const lines = log
          .slice(this.#takenLength)
          .matchAll(/"GET [^ ?]*\/blobs\/(\S+) HTTP\/1\.1" (\d+)/g);
        this.#takenLength = log.length;
        return Array.from(lines, ([, digest = "", status]) => ({ digest, status: Number(status) }));
      }
      if (Date.now() > end)
        throw new Error(`docker-registry has not answered all:\n${log.slice(-4000)}`);
    }
  }
}

/** Puts an image there, byte for byte, by skopeo. */
export async function pushImage(content: TestContent, name: string): Promise<void> {
  const folder = interopFolder("image");
  writeFileSync(join(folder, "version"), "Directory Transport Version: 1.1\n");
  writeFileSync(join(folder, "manifest.json"), content.bytes);
  for (const [digest, bytes] of content.blobs)
    writeFileSync(join(folder, digest.slice("sha256:".length)), bytes);
  await skopeo(
    "copy",
    "--preserve-digests",
    "--dest-tls-verify=false",
    `dir:${folder}`,
    `docker://${name}`,
  );
}

export async function startRealRegistry(options: RealRegistryOptions = {}): Promise<RealRegistry> {
  const folder = interopFolder("registry");
  const { tls, storage = join(folder, "storage"), program = "docker-registry" } = options;
  const files = writeFiles(folder, {
    "cert.pem": tls?.cert ?? "",
    "key.pem": tls?.key ?? "",
    "client-ca.pem": tls?.clientCa ?? "",
    htpasswd: options.htpasswd ? await htpasswd(options.htpasswd) : "",
  });
  const configPath = join(folder, "config.json");
  // The configuration is YAML, of which JSON is a part.
  const configure = (port: number) =>
    writeFileSync(
      configPath,
      JSON.stringify({
        version: "0.1",
        log: { level: "debug" }, // says too when a request begins
        storage: {
          filesystem: { rootdirectory: storage },
          delete: { enabled: true },
          cache: { blobdescriptor: "inmemory" },
        },
        http: {
          addr: `127.0.0.1:${port}`,
          secret: "imgpull tests",
          ...(tls && {
            tls: {
              certificate: files["cert.pem"],
              key: files["key.pem"],
              ...(tls.clientCa !== undefined && { clientcas: [files["client-ca.pem"]] }),
            },
          }),
        },
        ...(options.htpasswd && {
          auth: { htpasswd: { realm: "imgpull tests", path: files.htpasswd } },
        }),
        ...options.configuration,
      }),
    );
  configure(options.port ?? 0);
  const registry = new RealRegistry(
    {
      name: program,
      folder,
      command: [program, "serve", configPath],
      ready: /listening on 127\.0\.0\.1:(\d+)/,
      stopSignal: "SIGTERM",
    },
    storage,
  );
  const [, port] = await registry.start();
  registry.port = Number(port);
  configure(registry.port);
  return registry;
}

/**
 * go-containerregistry's, in memory, with the referrers endpoint; CI builds it from
 * referrers-registry.go.
 */
export async function startReferrersRegistry(): Promise<RealRegistry> {
  const folder = interopFolder("referrers-registry");
  const registry = new RealRegistry(
    {
      name: "referrers-registry",
      folder,
      command: ["referrers-registry"],
      ready: /listening on 127\.0\.0\.1:(\d+)/,
      stopSignal: "SIGTERM",
    },
    folder,
  );
  const [, port] = await registry.start();
  registry.port = Number(port);
  return registry;
}

export interface StoredManifest {
  bytes: Buffer;
  digest: string;
  mediaType: string;
  json: Record<string, unknown>;
}

/** A manifest as the registry serves it, asked for without imgpull. */
export async function storedManifest(
  host: string,
  repository: string,
  reference: string,
): Promise<StoredManifest> {
  const url = `http://${host}/v2/${repository}/manifests/${reference}`;
  const accept = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
  ].join(", ");
  const response = await fetch(url, { headers: { accept } });
  const bytes = Buffer.from(await response.arrayBuffer());
  if (!response.ok) throw new Error(`GET ${url}: ${response.status} ${bytes}`);
  const mediaType = response.headers.get("content-type") ?? "";
  return {
    bytes,
    digest: digestOf(bytes),
    mediaType,
    json: JSON.parse(bytes.toString()) as Record<string, unknown>,
  };
}

// ====== Docker's token service ======

export class TokenServer extends Service {
  readonly port: number;
  /** PEM of the certificate by which a registry knows its tokens. */
  readonly certificate: string;

  constructor(program: Program, port: number, certificate: string) {
    super(program);
    this.port = port;
    this.certificate = certificate;
  }

  get realm(): string {
    return `http://localhost:${this.port}/token/`;
  }

  /** How often it was asked for a token, by method. */
  asked(): { get: number; post: number } {
    const requests = { GET: new Set<string>(), POST: new Set<string>() };
    const lines = this.log().matchAll(/request\.id=(\S+) .*?request\.method=(GET|POST) /g);
    for (const [, id = "", method] of lines) requests[method as "GET" | "POST"].add(id);
    return { get: requests.GET.size, post: requests.POST.size };
  }

  /** An identity token, as `docker login` gets one. */
  async identityToken({ user, password }: Account, service: string): Promise<string> {
    const authorization = `Basic ${Buffer.from(`${user}:${password}`).toString("base64")}`;
    const url = `${this.realm}?service=${service}&offline_token=true&account=${user}`;
    const answer = (await (await fetch(url, { headers: { authorization } })).json()) as {
      refresh_token: string;
    };
    return answer.refresh_token;
  }
}

/**
 * The one of docker/distribution 2.8: Basic for tokens, OAuth2 for identity tokens; a user owns
 * USER/….
 */
export async function startTokenServer(account: Account, authority: ServerTls) {
  const folder = interopFolder("token-server");
  const key = createPrivateKey(authority.key).export({ type: "sec1", format: "pem" }).toString();
  const files = writeFiles(folder, { "key.pem": key, htpasswd: await htpasswd(account) });
  const options = ["-debug", "-issuer", "imgpull tests", "-realm", "imgpull tests"];
  const server = await startOnFreePort((port) => {
    const own = ["-addr", `127.0.0.1:${port}`, "-key", files["key.pem"], "-passwd", files.htpasswd];
    const program: Program = {
      name: "token-server",
      folder,
      command: ["token-server", ...options, ...own],
      ready: /Loaded private key/,
      stopSignal: "SIGTERM",
    };
    return new TokenServer(program, port, authority.cert);
  });
  // It says nothing when it listens.
  for (let attempt = 0; attempt < 500; attempt += 1) {
    const isListening = await fetch(server.realm).then(
      () => true,
      () => false,
    );
    if (isListening) return server;
    await pause(20);
  }
  throw new Error(`token-server does not answer:\n${server.log()}`);
}

// ====== Proxies ======

export interface SquidOptions {
  account?: Account;
  /**
   * Names that only the proxy can resolve: imgpull never sends loopback through a proxy, so tests
   * need a name.
   */
  hosts?: Record<string, string>;
  /**
   * In place of a forward proxy without a cache: a cache before the server on this port of
   * 127.0.0.1.
   */
  cacheOf?: number;
}

export class Squid extends Service {
  readonly port: number;

  constructor(program: Program, port: number) {
    super(program);
    this.port = port;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }
}

/**
 * A forward proxy without a cache: CONNECT to any port, and absolute-form requests. Its access log
 * names each.
 */
export async function startSquid(options: SquidOptions = {}): Promise<Squid> {
  const folder = interopFolder("squid");
  // It gives up root's rights for the user proxy, who writes the access log here and reads what
  // follows.
  chmodSync(folder, 0o777);
  const { account, hosts = {}, cacheOf } = options;
  const cache =
    cacheOf === undefined
      ? "cache deny all\ncache_mem 0"
      : `cache_peer 127.0.0.1 parent ${cacheOf} 0 no-query originserver
cache_mem 256 MB
maximum_object_size_in_memory 128 MB
maximum_object_size 128 MB`;
  const accelerates = cacheOf === undefined ? "" : " accel defaultsite=localhost";
  const files = writeFiles(folder, {
    hosts: Object.entries(hosts)
      .map(([name, address]) => `${address} ${name}\n`)
      .join(""),
    htpasswd: account ? await htpasswd(account) : "",
  });
  const access = account
    ? `
auth_param basic program /usr/lib/squid/basic_ncsa_auth ${files.htpasswd}
auth_param basic realm imgpull tests
acl known proxy_auth REQUIRED
http_access allow known
http_access deny all`
    : "http_access allow all";
  return startOnFreePort((port) => {
    const { "squid.conf": config } = writeFiles(folder, {
      "squid.conf": `http_port 127.0.0.1:${port}${accelerates}
pid_filename none
${cache}
cache_log /dev/null
cache_store_log none
access_log stdio:${join(folder, "access.log")}
coredump_dir ${folder}
netdb_filename none
pinger_enable off
logfile_rotate 0
max_filedescriptors 1024
shutdown_lifetime 0 seconds
visible_hostname localhost
hosts_file ${files.hosts}
dns_nameservers 127.0.0.1
${access}
`,
    });
    // A name of its own: under squid's usual one, what another has left in /dev/shm makes it fail.
    const sharedMemory = `imgpull${process.pid}x${port}`;
    const command = ["squid", "-N", "-n", sharedMemory, "-d", "1", "-f", config];
    const ready = /Accepting (reverse-proxy )?HTTP Socket/;
    // SIGTERM keeps it for seconds, whatever its shutdown_lifetime.
    const stopSignal = "SIGKILL";
    return new Squid({ name: "squid", folder, command, ready, stopSignal, sharedMemory }, port);
  });
}

export interface NginxOptions {
  /** `http://127.0.0.1:PORT` */
  upstream: string;
  tls?: ServerTls;
  /** nginx asks for it, and does not hand it on. */
  htpasswd?: Account;
  /** Further `location` blocks. */
  locations?: string;
  /** Keeps what it has fetched, as nginx does by default: without a lock, whole for each range. */
  isCache?: true;
  /** Further directives of the cache. */
  cacheSettings?: string;
}

/** A request that nginx answered; whether it came with an Authorization header. */
export interface NginxRequest {
  path: string;
  status: number;
  bytes: number;
  isAuthorized: boolean;
}

export class Nginx extends Service {
  readonly port: number;

  constructor(program: Program, port: number) {
    super(program);
    this.port = port;
  }

  get host(): string {
    return `localhost:${this.port}`;
  }

  /** All that it was asked so far. */
  requests(): NginxRequest[] {
    const lines = readFileSync(join(this.folder, "requests.log"), "latin1").matchAll(
      /^(\S+) (\d+) (\d+) (\w+)$/gm,
    );
    return Array.from(lines, ([, path = "", status, bytes, shown]) => ({
      path,
      status: Number(status),
      bytes: Number(bytes),
      isAuthorized: shown === "authorized",
    }));
  }
}

/** A reverse proxy, as people put before a registry for TLS and passwords. */
export async function startNginx(options: NginxOptions): Promise<Nginx> {
  const folder = interopFolder("nginx");
  const { tls, htpasswd: account } = options;
  const files = writeFiles(folder, {
    "cert.pem": tls?.cert ?? "",
    "key.pem": tls?.key ?? "",
    "client-ca.pem": tls?.clientCa ?? "",
    htpasswd: account ? await htpasswd(account) : "",
  });
  const server = [
    tls && `ssl_certificate ${files["cert.pem"]}; ssl_certificate_key ${files["key.pem"]};`,
    tls?.clientCa !== undefined &&
      `ssl_client_certificate ${files["client-ca.pem"]}; ssl_verify_client on;`,
    account && `auth_basic "imgpull tests"; auth_basic_user_file ${files.htpasswd};`,
  ]
    .filter(Boolean)
    .join("\n    ");
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    .map((kind) => `${kind}_temp_path ${join(folder, kind)};`)
    .join("\n  ");
  const cachePath = `proxy_cache_path ${join(folder, "cache")} keys_zone=blobs:1m max_size=1g;`;
  const cache = "proxy_cache blobs; proxy_cache_valid 200 1h; proxy_buffering on;";
  return startOnFreePort((port) => {
    const { "nginx.conf": config } = writeFiles(folder, {
      "nginx.conf": `daemon off;
master_process off;
user root;
pid ${join(folder, "pid")};
error_log stderr notice;
events { worker_connections 256; }
http {
  map $http_authorization $shown { default authorized; "" anonymous; }
  log_format requests "$request_uri $status $body_bytes_sent $shown";
  access_log ${join(folder, "access.log")};
  access_log ${join(folder, "requests.log")} requests;
  ${temporary}
  ${options.isCache ? cachePath : ""}
  server {
    listen 127.0.0.1:${port}${tls ? " ssl" : ""};
    ${server}
    client_max_body_size 0;
    ${options.locations ?? ""}
    location / {
      proxy_pass ${options.upstream};
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-Proto $scheme;
      ${account ? 'proxy_set_header Authorization "";' : ""}
      ${options.isCache ? cache : "proxy_buffering off;"}
      ${options.cacheSettings ?? ""}
    }
  }
}
`,
    });
    const command = ["nginx", "-p", folder, "-e", "stderr", "-c", config];
    const ready = /using the "\w+" event method/;
    return new Nginx({ name: "nginx", folder, command, ready, stopSignal: "SIGTERM" }, port);
  });
}

// ====== What loads images ======

export class Containerd extends Service {
  get address(): string {
    return join(this.folder, "containerd.sock");
  }

  /**
   * `import` and `mount` take `--snapshotter native`, which needs no overlayfs below its folder.
   */
  ctr(...args: string[]): Promise<string> {
    return run(["ctr", "--address", this.address, ...args]);
  }
}

export async function startContainerd(): Promise<Containerd> {
  const folder = interopFolder("containerd");
  const unneeded = [
    "grpc.v1.cri",
    "internal.v1.opt",
    "snapshotter.v1.aufs",
    "snapshotter.v1.btrfs",
    "snapshotter.v1.devmapper",
    "snapshotter.v1.zfs",
  ];
  const { "config.toml": config } = writeFiles(folder, {
    "config.toml": `version = 2
root = "${join(folder, "root")}"
state = "${join(folder, "state")}"
disabled_plugins = ${JSON.stringify(unneeded.map((plugin) => `io.containerd.${plugin}`))}
[grpc]
address = "${join(folder, "containerd.sock")}"
[ttrpc]
address = "${join(folder, "ttrpc.sock")}"
`,
  });
  const command = ["containerd", "--config", config];
  const ready = /successfully booted/;
  const containerd = new Containerd({
    name: "containerd",
    folder,
    command,
    ready,
    stopSignal: "SIGTERM",
  });
  await containerd.start();
  return containerd;
}

export class Docker extends Service {
  /** DOCKER_HOST and an empty DOCKER_CONFIG; the classic builder, which needs no download. */
  get environment(): Record<string, string> {
    const host = `unix://${join(this.folder, "docker.sock")}`;
    return { DOCKER_HOST: host, DOCKER_CONFIG: join(this.folder, "client"), DOCKER_BUILDKIT: "0" };
  }

  docker(...args: string[]): Promise<string> {
    return run(["docker", ...args], { env: this.environment });
  }
}

/**
 * dockerd for images only: without the network that running a container needs. Stop it before
 * containerd.
 */
export async function startDocker(containerd: Containerd): Promise<Docker> {
  const folder = interopFolder("docker");
  const host = `unix://${join(folder, "docker.sock")}`;
  mkdirSync(join(folder, "client"));
  const { "daemon.json": config } = writeFiles(folder, { "daemon.json": "{}" });
  const docker = new Docker({
    name: "dockerd",
    folder,
    ready: /API listen on/,
    stopSignal: "SIGTERM",
    command: [
      "dockerd",
      "--config-file",
      config,
      "--host",
      host,
      "--containerd",
      containerd.address,
      "--data-root",
      join(folder, "data"),
      "--exec-root",
      join(folder, "exec"),
      "--pidfile",
      join(folder, "pid"),
      "--storage-driver",
      "vfs",
      "--bridge",
      "none",
      "--iptables=false",
      "--ip6tables=false",
    ],
  });
  await docker.start();
  return docker;
}

export interface Podman {
  (...args: string[]): Promise<string>;
  /** What it runs for these arguments. */
  command: (...args: string[]) => string[];
}

/** podman with a store of its own; it has no daemon. */
export function makePodman(): Podman {
  const folder = interopFolder("podman");
  const store = ["root", "runroot", "tmpdir"].flatMap((name) => [`--${name}`, join(folder, name)]);
  const settings = [
    "--storage-driver",
    "vfs",
    "--events-backend",
    "file",
    "--cgroup-manager",
    "cgroupfs",
  ];
  const command = (...args: string[]) => ["podman", ...store, ...settings, ...args];
  return Object.assign((...args: string[]) => run(command(...args)), { command });
}

export function skopeo(...args: string[]): Promise<string> {
  return run(["skopeo", "--insecure-policy", ...args]);
}

export interface UmociImage {
  /** An OCI layout folder, made if it is not there. */
  layout: string;
  tag: string;
  /** An image of the same layout to start from. */
  base?: string;
  /** Go's name; default this machine's. */
  architecture?: string;
  /** One layer each: what it does to the root file system. */
  layers: ((rootfs: string) => void)[];
}

/**
 * Makes an OCI image, its layers packed by umoci, and gives back the folder with its root file
 * system.
 */
export async function makeUmociImage(image: UmociImage): Promise<string> {
  const name = `${image.layout}:${image.tag}`;
  const bundle = join(interopFolder("umoci"), "bundle");
  if (!existsSync(image.layout)) await run(["umoci", "init", "--layout", image.layout]);
  if (image.base === undefined) await run(["umoci", "new", "--image", name]);
  else await run(["umoci", "tag", "--image", `${image.layout}:${image.base}`, image.tag]);
  await run(["umoci", "unpack", "--image", name, bundle]);
  for (const change of image.layers) {
    change(join(bundle, "rootfs"));
    await run(["umoci", "repack", "--refresh-bundle", "--image", name, bundle]);
  }
  if (image.architecture !== undefined) {
    await run(["umoci", "config", "--architecture", image.architecture, "--image", name]);
  }
  return join(bundle, "rootfs");
}

// ====== A look inside ======

/** The root file system of an image that dockerd has; then the image is removed. */
export async function takeFromDocker(docker: Docker, image: string): Promise<string> {
  const folder = interopFolder("docker-export");
  const rootfs = join(folder, "rootfs");
  mkdirSync(rootfs);
  const container = (await docker.docker("create", image, "/never-run")).trim();
  await docker.docker("export", "--output", join(folder, "export.tar"), container);
  await docker.docker("rm", container);
  await docker.docker("image", "rm", "--force", image);
  await run(["tar", "-xpf", join(folder, "export.tar"), "-C", rootfs]);
  return rootfs;
}

export async function manifestDigestInContainerd(
  containerd: Containerd,
  name: string,
): Promise<string | undefined> {
  const lines = (await containerd.ctr("images", "ls", `name==${name}`)).trim().split("\n").slice(1);
  return lines.map((line) => line.split(/\s+/)).find(([reference]) => reference === name)?.[2];
}

export async function takeFromContainerd(
  containerd: Containerd,
  name: string,
  architecture: string,
): Promise<string> {
  const folder = interopFolder("containerd-mount");
  const mounted = join(folder, "mounted");
  const rootfs = join(folder, "rootfs");
  mkdirSync(mounted);
  const platform = `linux/${architecture}`;
  await containerd.ctr(
    "images",
    "mount",
    "--snapshotter",
    "native",
    "--platform",
    platform,
    name,
    mounted,
  );
  try {
    await run(["cp", "--archive", mounted, rootfs]);
  } finally {
    await containerd.ctr("images", "unmount", "--snapshotter", "native", "--rm", mounted);
  }
  await containerd.ctr("images", "rm", "--sync", name);
  return rootfs;
}

/**
 * Every path below a folder with what it is: `file 644 sha256:…`, `folder 755`, `link → target`.
 */
export function treeOf(folder: string): Map<string, string> {
  const tree = new Map<string, string>();
  // Not readdir's `recursive`, which in some versions follows links to folders (nodejs/node#51858,
  // #55714).
  const walk = (below: string): void => {
    for (const name of readdirSync(join(folder, below))) {
      const path = join(below, name);
      const stats = lstatSync(join(folder, path));
      const mode = (stats.mode & 0o7777).toString(8);
      if (stats.isSymbolicLink()) tree.set(path, `link → ${readlinkSync(join(folder, path))}`);
      else if (stats.isFile())
        tree.set(path, `file ${mode} ${digestOf(readFileSync(join(folder, path)))}`);
      else tree.set(path, stats.isDirectory() ? `folder ${mode}` : "special");
      if (stats.isDirectory()) walk(path);
    }
  };
  walk("");
  return tree;
}
