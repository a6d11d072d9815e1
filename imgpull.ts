/*
 * imgpull: pull container images from an OCI registry into one verified tar. It only pulls.
 *
 *    1 imports, media types, limits   2 public types        3 errors            4 primitives
 *    5 references                     6 transport           7 retry             8 credentials and tokens
 *    9 registry                      10 manifests          11 tar              12 pull
 *   13 Puller                        14 looking at a tar   15 command line     16 exports
 *
 * Data flows one way: options → references → manifests → plan (every entry with its offset) → bytes → DEST.
 *
 * Requests made: GET and HEAD /v2/REPOSITORY/manifests/…, GET /v2/REPOSITORY/blobs/…, what these redirect to, the
 * token endpoint that the registry names (GET, or POST for an identity token), CONNECT to a proxy, and the `urls` of
 * a foreign layer that the registry does not have. Nothing else is contacted.
 *
 * Files read: --cert, --key, --cacert, --from, --reuse, --since, the tar to look at; the credential files of section
 * 8; the system's certificate store and /etc/docker/certs.d (section 6). Files written: DEST, and while it is being
 * made DEST.partial with DEST.partial.journal, .lock and .old. Programs run: docker-credential-NAME, where a
 * credential file names it.
 *
 * Environment read: HOME, DOCKER_CONFIG, DOCKER_AUTH_CONFIG, REGISTRY_AUTH_FILE, XDG_RUNTIME_DIR, SSL_CERT_FILE,
 * SSL_CERT_DIR, NODE_EXTRA_CA_CERTS, HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY (and lower case), NO_COLOR, TERM.
 *
 * Not here on purpose: push, serve, build, run, sign, convert, recompress, schema 1, a cache outside DEST.
 */

// ====== 1. Imports, media types, limits ======

import { spawnSync } from "node:child_process";
import { createHash, type Hash } from "node:crypto";
import * as fs from "node:fs/promises";
import * as http from "node:http";
import * as https from "node:https";
import * as net from "node:net";
import * as os from "node:os";
import * as path from "node:path";
import { Readable, Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import * as tls from "node:tls";
import { parseArgs } from "node:util";
import * as zlib from "node:zlib";

declare const IMGPULL_VERSION: string;
declare const IMGPULL_BUILD_DATE: string;

const DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1";
const OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX = "application/vnd.oci.image.index.v1+json";
const INDEX_TYPES = [OCI_INDEX, DOCKER_INDEX];
const MANIFEST_TYPES = [...INDEX_TYPES, OCI_MANIFEST, DOCKER_MANIFEST];
const CONFIG_TYPES = ["application/vnd.docker.container.image.v1+json", "application/vnd.oci.image.config.v1+json"];

const MIB = 1024 * 1024;
const NEVER = Number.POSITIVE_INFINITY;
/** Every bound in one place. What a registry can make us hold in memory is here, whatever it sends. */
const LIMITS = Object.freeze({
  manifestBytes: 4 * MIB, // the distribution specification's own floor for registries
  configBytes: 16 * MIB,
  tokenBytes: MIB,
  errorBodyBytes: MIB / 16,
  credentialFileBytes: 4 * MIB,
  tarMetadataBytes: 16 * MIB, // index.json and the like of a tar that someone else made
  indexDepth: 4,
  indexEntries: 1024, // with `--platform all` each entry is a request
  redirects: 10,
  tokenFloorMs: 60_000, // the token specification's default, and more than a skewed clock takes away
  firstBackoffMs: 1000,
  backoffMs: 30_000,
  retryAfterMs: 120_000, // longer waits are the user's to decide
  batchBytes: MIB, // one write to disk: fewer trips to Node's thread pool than one for each chunk
  journalBytes: MIB, // how much a kill -9 may cost each blob, beside what a connection has gathered
  splitBytes: MIB, // neither half of a range that is cut in two is smaller,
  nearSplitBytes: 16 * MIB, // nor on a near line, where a server has megabytes under way that a cut throws away
  fastLineBytesPerSecond: 256 * MIB, // from here on the processor is the limit, and more connections only cost
  farLatencyMs: 10, // from here on a line is worth several connections before its speed is known
  streamUnitBytes: 4 * MIB, // DEST `-`: one request's share of a large blob
  streamWindowBytes: 32 * MIB, // DEST `-`: how far the line may be ahead of the reader
  lockBeatMs: 10_000, // a lock of another machine that is six beats old belongs to nobody
});

// ====== 2. Public types ======

/** An operating system and processor in Go's words: `{ os: "linux", architecture: "arm", variant: "v7" }`. */
interface Platform { os: string; architecture: string; variant?: string }
/** A content descriptor, OCI image specification, descriptor.md. `size` is in bytes. */
interface Descriptor {
  mediaType: string;
  digest: string;
  size: number;
  urls?: string[];
  platform?: Platform;
  annotations?: Record<string, string>;
}
/** What to pull and how. Only `url` is required; the rest has the command's defaults (SPEC §1, §9). */
interface PullerOpts {
  /** The image reference: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`. */
  url: string;
  scheme?: "https" | "http";
  /** Platform wanted, in Go's words; the default is this machine's. */
  osType?: string;
  archType?: string;
  variant?: string;
  username?: string;
  password?: string;
  /** An outside token (ECR's), sent as `Authorization: Basic TOKEN`. */
  token?: string;
  /** Paths of PEM files: client certificate and key, and additional certificate authorities. */
  tlsCert?: string;
  tlsKey?: string;
  caCert?: string;
  /** Does not verify the server's certificate. */
  insecure?: boolean;
  /** The upstream registry that a mirror stands for: `?ns=HOST`. */
  namespace?: string;
  /** Connections used at once; default 8, at most 64. */
  concurrency?: number;
  /** Attempts after the first; default 5. */
  retries?: number;
  /** How long a connection may be silent, in milliseconds; default 30000. */
  timeoutMs?: number;
  signal?: AbortSignal;
  onProgress?: (progress: Progress) => void;
  /** One line each: a retry, a fallback, a layer that some loaders refuse. */
  onWarning?: (message: string) => void;
}
/** Bytes are of blobs, before any tar header; `doneBytes` never falls, and equals `totalBytes` at the end. */
interface Progress {
  phase: "resolve" | "fetch" | "finish";
  doneBytes: number;
  totalBytes: number;
  blobsDone: number;
  blobsTotal: number;
}
/**
 * What DEST now holds. `digest` is the manifest's (the index's when every platform was asked for); `platform` is
 * `os/architecture[/variant]`, `all`, or empty for what is not an image; `sizeBytes` is DEST's (in a directory: of the
 * blobs), `fetchedBytes` what came over the line as blobs: the rest was there already.
 */
interface PullResult {
  name: string;
  digest: string;
  platform: string;
  layers: number;
  sizeBytes: number;
  fetchedBytes: number;
}
/** A manifest as the registry sent it. `bytes` has the digest; `manifest` is the parsed JSON. */
interface ManifestHolder { mediaType: string; digest: string; bytes: Uint8Array; manifest: unknown; imageUrl: string }

type ErrorCode =
  | "BAD_REFERENCE" | "BAD_OPTION" | "NOT_FOUND" | "UNAUTHORIZED" | "FORBIDDEN" | "RATE_LIMITED" | "NO_PLATFORM"
  | "NOT_AN_IMAGE" | "UNSUPPORTED" | "TOO_LARGE" | "DIGEST_MISMATCH" | "SIZE_MISMATCH" | "PROTOCOL" | "NETWORK"
  | "TIMEOUT" | "TLS" | "CREDENTIALS" | "PROXY" | "DISK" | "BAD_TAR" | "ABORTED";

// ====== 3. Errors ======
// One class with a code. The message is what failed, then the request and the registry's words, then the remedy.

interface ErrorDetails { status?: number | undefined; retryAfterMs?: number | undefined; cause?: unknown }
/** The only error thrown on purpose; anything else is a bug. `status` is the HTTP status, where there was one. */
class ImgpullError extends Error {
  override readonly name = "ImgpullError";
  readonly code: ErrorCode;
  readonly status?: number;
  /** @internal how long the server asks us to stay away */
  readonly retryAfterMs?: number;

  constructor(code: ErrorCode, message: string, details: { status?: number | undefined; cause?: unknown } = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    const { status, retryAfterMs } = details as ErrorDetails;
    if (status !== undefined) this.status = status;
    if (retryAfterMs !== undefined) this.retryAfterMs = retryAfterMs;
  }
}

function fail(code: ErrorCode, message: string, details?: ErrorDetails): never {
  throw new ImgpullError(code, message, details);
}

const errorCodeOf = (error: unknown): string => String((error as { code?: unknown } | undefined)?.code ?? "");
/** Text from outside, fit for a terminal: no control characters or escapes, no line breaks, bounded. */
function printable(text: string, maximum = 300): string {
  // C0, DEL, C1, and the bidirectional and line controls that reorder what a person reads.
  const controls = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g;
  const clean = text.replace(controls, " ").trim();
  return clean.length > maximum ? `${clean.slice(0, maximum)}…` : clean;
}
/** A URL without user, password and query (which may be a signature); `?ns=` is ours and is kept. */
function redactUrl(url: URL | string): string {
  const { protocol, host, pathname, searchParams } = new URL(url);
  const namespace = searchParams.get("ns");
  return printable(`${protocol}//${host}${pathname}${namespace === null ? "" : `?ns=${namespace}`}`);
}
/** What Node says of a connection that failed, in our codes, with the remedy where one is known. */
function connectionError(error: unknown, doing: string): ImgpullError {
  if (error instanceof ImgpullError) return error;
  const cause = error as NodeJS.ErrnoException & { errors?: Error[] };
  const code = errorCodeOf(error);
  const said = printable(cause.message || cause.errors?.[0]?.message || code); // happy eyeballs: one for each address
  const make = (kind: ErrorCode, words: string) => new ImgpullError(kind, `${doing}: ${words}`, { cause });
  if (cause.name === "AbortError") return new ImgpullError("ABORTED", "stopped", { cause });
  // An https client that meets plain HTTP reads "HTTP/1.1" as a TLS record of an absurd version or length.
  if (/wrong version number|packet length too long|unknown protocol|record layer failure/i.test(said)) {
    return make("TLS", "the server answers plain HTTP on this port\n  try --scheme http");
  }
  if (/^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO)/.test(code)) {
    return make("TLS", `${said}\n  its certificate authority is not known here: --cacert FILE gives it, --insecure goes without`);
  }
  if (/^(CERT_|INVALID_|ERR_TLS|ERR_SSL|EPROTO)/.test(code)) {
    const wantsClient = /certificate required|bad certificate|handshake failure/i.test(said);
    return make("TLS", wantsClient ? `${said}\n  it may want a client certificate: --cert FILE --key FILE` : said);
  }
  return make("NETWORK", code === "ENOTFOUND" ? "no such host" : code === "ECONNRESET" ? "connection lost" : said);
}

const DISK_WORDS: Record<string, string> = {
  ENOSPC: "the disk is full", EDQUOT: "the disk quota is used up", EROFS: "the file system is read-only",
  EACCES: "permission denied", EPERM: "permission denied", ERR_ACCESS_DENIED: "not allowed by Node's permission model",
  ENOENT: "no such file or directory", ENOTDIR: "a part of the path is not a directory", EISDIR: "it is a directory",
  EFBIG: "the file system does not take a file of that size",
};
const diskWords = (error: unknown): string => DISK_WORDS[errorCodeOf(error)] ?? printable((error as Error).message);
/** Waits for work on files; what the system refuses becomes a DISK error that says which and why. */
function onDisk<T>(doing: string, work: Promise<T>): Promise<T> {
  return work.catch((error: NodeJS.ErrnoException) => {
    const isSystem = error.syscall !== undefined || errorCodeOf(error) === "ERR_ACCESS_DENIED";
    throw isSystem ? new ImgpullError("DISK", `${doing}: ${diskWords(error)}`, { cause: error }) : error;
  });
}
/** Several things that failed are one error that names each, so that a list is mended in one go. */
function joinErrors(failures: readonly unknown[]): unknown {
  const known = failures.filter((failure) => failure instanceof ImgpullError);
  if (known.length < failures.length) return failures.find((failure) => !(failure instanceof ImgpullError)); // a bug
  const told = known.filter(({ code }) => code !== "ABORTED");
  const [first = known[0] as ImgpullError] = told;
  const messages = [...new Set(told.map(({ message }) => message))];
  return messages.length < 2 ? first : new ImgpullError(first.code, messages.join("\n"), { status: first.status, cause: first });
}

// ====== 4. Primitives ======
// Digests, sizes, JSON from outside, work side by side. Nothing here knows of a registry.

/** A digest is checked here before it touches a path or a URL: algorithm known, lower-case hex, exact length. */
const isDigest = (text: unknown): text is string =>
  typeof text === "string" && /^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/.test(text);
const hexOf = (digest: string): string => digest.slice(digest.indexOf(":") + 1);
const newHash = (digest: string): Hash => createHash(digest.slice(0, digest.indexOf(":")));
/** The digest of bytes, by the algorithm of another digest. */
const digestOf = (bytes: Uint8Array, like = "sha256:"): string =>
  `${like.slice(0, like.indexOf(":"))}:${newHash(like).update(bytes).digest("hex")}`;

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
const encodeJson = (value: unknown): Buffer => Buffer.from(JSON.stringify(value), "utf8");

function parseJson(text: string | Buffer): unknown {
  try {
    return JSON.parse(String(text)) as unknown;
  } catch {
    return undefined; // without the parser's words: they quote the text, which may be a secret
  }
}
/** The values that are there: what is undefined or empty is left out. */
const given = <T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } =>
  Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined && value !== "")) as never;

function sumOf<T>(items: Iterable<T>, value: (item: T) => number): number {
  let sum = 0;
  for (const item of items) sum += value(item);
  return sum;
}

function formatBytes(bytes: number): string {
  let [value, unit] = [bytes, 0];
  for (; value >= 999.5 && unit < 4; unit += 1) value /= 1000;
  return `${unit === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

const formatPlatform = ({ os: system, architecture, variant }: Partial<Platform> = {}): string =>
  [system, architecture, variant].filter(Boolean).join("/");
/** Runs at most `limit` at once, keeps the order, and lets every one end before what failed is thrown. */
async function mapConcurrently<T, R>(items: readonly T[], limit: number, run: (item: T) => Promise<R>): Promise<R[]> {
  const results: PromiseSettledResult<R>[] = [];
  let next = 0;
  const lane = async () => {
    while (next < items.length) {
      const index = next++;
      [results[index]] = await Promise.allSettled([run(items[index] as T)]) as [PromiseSettledResult<R>];
    }
  };
  await Promise.all(Array.from({ length: limit }, lane));
  return settled(results);
}

function settled<R>(results: readonly PromiseSettledResult<R>[]): R[] {
  const failures = results.flatMap((result) => (result.status === "rejected" ? [result.reason as unknown] : []));
  if (failures.length > 0) throw joinErrors(failures);
  return results.map((result) => (result as PromiseFulfilledResult<R>).value);
}

// ====== 5. References ======
// The grammar of the distribution specification ("Pulling manifests") and of docker's reference package. SPEC §2.

/** `host` is the name people use (`docker.io`); apiHost() says where its API is. */
interface Reference { readonly host: string; readonly repository: string; readonly tag?: string; readonly digest?: string }

const HUB_HOSTS = ["docker.io", "index.docker.io", "registry-1.docker.io"];
const LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?";
const HOST = new RegExp(`^(?:${LABEL}(?:\\.${LABEL})*|\\[(?<ipv6>[0-9a-fA-F:.]+)\\])(?::(?<port>\\d{1,5}))?$`);
const PATH_PART = "[a-z0-9]+(?:(?:\\.|_{1,2}|-+)[a-z0-9]+)*";
const REPOSITORY = new RegExp(`^${PATH_PART}(?:/${PATH_PART})*$`);
const TAG = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/;

function isHost(text: string): boolean {
  const { ipv6, port = "443" } = HOST.exec(text)?.groups ?? {};
  return HOST.test(text) && Number(port) >= 1 && Number(port) <= 65535 && (ipv6 === undefined || net.isIPv6(ipv6));
}
/** Throws BAD_REFERENCE with the reason; nothing is asked of any registry for a reference that cannot be right. */
function parseReference(text: string): Reference {
  const refuse = (reason: string): never => fail("BAD_REFERENCE", `bad image reference "${printable(text)}": ${reason}`);
  if (text === "") refuse("it is empty");
  if (/^[a-z]+:\/\//i.test(text)) refuse("write it without the scheme (use --scheme for http)");
  if (/[^\x21-\x7e]/.test(text)) refuse("it has a character that is not printable ASCII");
  const [named = "", digest, ...tooMany] = text.split("@");
  if (tooMany.length > 0) refuse("it has more than one @");
  if (digest !== undefined && !isDigest(digest)) {
    refuse(`"${printable(digest)}" is not a digest: sha256: and 64, or sha512: and 128 lower-case hex digits`);
  }
  const [first = "", ...rest] = named.split("/");
  const hasHost = rest.length > 0 && (/[.:]/.test(first) || first === "localhost");
  const [host, path] = hasHost ? [first, rest.join("/")] : ["docker.io", named];
  const colon = path.lastIndexOf(":");
  const [name, tag] = colon < 0 ? [path] : [path.slice(0, colon), path.slice(colon + 1)];
  if (!isHost(host)) refuse(`"${host}" is not a host, host:port or [IPv6 address]`);
  if (name === "") refuse("the repository is missing");
  if (name !== name.toLowerCase()) refuse("a repository is written in lower case");
  if (!REPOSITORY.test(name)) refuse(`"${name}" is not a repository name`);
  if (tag !== undefined && !TAG.test(tag)) refuse(`"${tag}" is not a tag`);
  const isHub = HUB_HOSTS.includes(host.toLowerCase());
  const repository = isHub && !name.includes("/") ? `library/${name}` : name;
  if (host.length + repository.length + 1 > 255) refuse("host and repository are longer than 255 characters");
  const version = given({ tag: tag ?? (digest === undefined ? "latest" : undefined), digest });
  return { host: isHub ? "docker.io" : host, repository, ...version };
}

const formatReference = ({ host, repository, tag, digest }: Reference): string =>
  `${host}/${repository}${tag === undefined ? "" : `:${tag}`}${digest === undefined ? "" : `@${digest}`}`;
const apiHost = (host: string): string => (host === "docker.io" ? "registry-1.docker.io" : host);
/**
 * The name an image gets in the tar. A mirror stands for another registry, told by --ns or by the path's first
 * segment; the tag names, and only a reference without one is named by its digest.
 */
function imageName({ host, repository, tag, digest }: Reference, namespace?: string): Reference {
  const isMirrored = /^[^/]*\.[^/]*\//.test(repository);
  const bare = namespace !== undefined ? `${namespace}/${repository}` : isMirrored ? repository : `${host}/${repository}`;
  return parseReference(`${bare}${tag === undefined ? `@${digest}` : `:${tag}`}`);
}
/** `NAME-TAG.tar`, in the working directory. */
const defaultDestination = ({ repository, tag, digest = "" }: Reference): string =>
  `${repository.slice(repository.lastIndexOf("/") + 1)}-${tag ?? hexOf(digest).slice(0, 12)}.tar`;

// ====== 6. Transport ======
// One request: certificates, proxy, silence, redirects. It knows no registry and keeps no bytes. SPEC §6, §7.
// Invariant: an Authorization header and a client certificate are chosen anew for each origin, never carried over.

/** @internal */
type Environment = Readonly<Record<string, string | undefined>>;
/** What a pull was told, checked. `certsDirectory` is /etc/docker/certs.d, but for tests. */
interface Settings extends Readonly<Omit<PullerOpts, "url" | "osType" | "archType" | "variant" | "signal">> {
  readonly wanted: Partial<Platform>;
  readonly scheme: "https" | "http";
  readonly concurrency: number;
  readonly retries: number;
  readonly timeoutMs: number;
  readonly environment: Environment;
  readonly certsDirectory: string;
}
/** A request as its maker sees it. The registry's own origin gets client certificate and certs.d, no other does. */
type HttpRequest = Readonly<{
  method: string; url: URL; headers: Readonly<Record<string, string>>; body?: string; signal: AbortSignal;
  authorizationFor: (origin: string) => Promise<string | undefined>; isRegistry: (origin: string) => boolean;
}>;
/** What a server answered to which header. A body is there on success only; otherwise its words were read. */
type Answer = Readonly<{
  status: number; headers: http.IncomingHttpHeaders; url: URL; authorization: string | undefined;
  body?: http.IncomingMessage; words: string;
}>;

interface Transport { send(request: HttpRequest): Promise<Answer>; close(): void }

const readOptional = (file: string): Promise<string | undefined> => fs.readFile(file, "utf8").catch(() => undefined);
/** Where the distributions keep their certificates, in the order in which Go's crypto/x509 looks (root_linux.go). */
const CA_BUNDLES = [
  "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
  "/etc/pki/tls/cacert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
  "/usr/local/etc/ssl/cert.pem", "/usr/local/share/certs/ca-root-nss.crt", "/etc/openssl/certs/ca-certificates.crt",
];
const CA_DIRECTORIES = ["/etc/ssl/certs", "/etc/pki/tls/certs", "/system/etc/security/cacerts"];
/** The system's certificate store, as Go reads it; Node's own roots only where the system has none. */
async function systemCertificates(environment: Environment): Promise<string[]> {
  const { SSL_CERT_FILE: file, SSL_CERT_DIR: directories, NODE_EXTRA_CA_CERTS: extra } = environment;
  let bundle = "";
  const add = (text: string | undefined) => {
    if (text?.includes("-----BEGIN CERTIFICATE-----") && !bundle.includes(text.trim())) bundle += `${text}\n`;
  };
  for (const each of file ? [file] : CA_BUNDLES) if (bundle === "") add(await readOptional(each));
  for (const directory of directories?.split(path.delimiter) ?? (bundle === "" ? CA_DIRECTORIES : [])) {
    const names = await fs.readdir(directory).catch(() => []);
    for (const text of await Promise.all(names.map((name) => readOptional(path.join(directory, name))))) add(text);
  }
  // macOS and Windows keep theirs in no file; Node reads them since 22.15.
  const { getCACertificates } = tls as { getCACertificates?: (type: string) => string[] };
  if (bundle === "" && ["darwin", "win32"].includes(process.platform)) getCACertificates?.("system").forEach(add);
  if (bundle === "") tls.rootCertificates.forEach(add);
  if (extra) add(await readOptional(extra));
  return [bundle];
}

async function readPem(file: string, option: string): Promise<string> {
  const text = await fs.readFile(file, "utf8").catch((error: unknown) =>
    fail("TLS", `cannot read ${option} ${file}: ${diskWords(error)}`));
  return text.includes("-----BEGIN ") ? text : fail("TLS", `${option} ${file} is not a PEM file`);
}
/** One context for each kind of peer: parsing a system's 150 certificates anew for each connection would show. */
function secureContexts({ tlsCert, tlsKey, caCert, certsDirectory, environment }: Settings) {
  const contexts = new Map<string, Promise<tls.SecureContext>>();
  const make = async (url: URL, isRegistry: boolean) => {
    const ca = await systemCertificates(environment);
    if (caCert !== undefined) ca.push(await readPem(caCert, "--cacert"));
    // certs.d: *.crt are authorities, *.cert with the *.key of that name are for the client (docker's documentation).
    const folder = path.join(certsDirectory, url.host);
    const names = isRegistry ? (await fs.readdir(folder).catch(() => [])).sort() : [];
    const read = (suffix: string) => Promise.all(
      names.filter((name) => name.endsWith(suffix)).map((name) => readPem(path.join(folder, name), "certificate")));
    ca.push(...(await read(".crt")));
    const isGiven = isRegistry && tlsCert !== undefined && tlsKey !== undefined;
    const cert = isGiven ? [await readPem(tlsCert, "--cert")] : await read(".cert");
    const key = isGiven ? [await readPem(tlsKey, "--key")] : await read(".key");
    try {
      return tls.createSecureContext({ ca, cert, key });
    } catch (error) {
      return fail("TLS", `cannot use the certificates given: ${printable((error as Error).message)}`, { cause: error });
    }
  };
  return (url: URL, isRegistry: boolean): Promise<tls.SecureContext> => {
    const key = isRegistry ? url.host : "";
    const context = contexts.get(key) ?? make(url, isRegistry);
    contexts.set(key, context);
    return context;
  };
}
/** NO_PROXY in the forms that Go and curl take: `*`, names with their subdomains, ports, addresses, CIDR blocks. */
function isExemptFromProxy(url: URL, noProxy: string): boolean {
  const host = url.hostname.replace(/^\[|\]$/g, "").toLowerCase();
  const port = url.port || (url.protocol === "https:" ? "443" : "80");
  const familyOf = (address: string) => (net.isIPv6(address) ? "ipv6" : "ipv4");
  const isAddress = net.isIP(host) !== 0;
  const isInside = (block: string, bits: number) => {
    const list = new net.BlockList();
    list.addSubnet(block, bits, familyOf(block));
    return isAddress && list.check(host, familyOf(host));
  };
  if (/(^|\.)localhost$/.test(host) || isInside("127.0.0.0", 8) || isInside("::1", 128)) return true;
  return noProxy.toLowerCase().split(/[\s,]+/).filter(Boolean).some((entry) => {
    const [block = "", bits] = entry.split("/");
    const width = net.isIPv6(block) ? 128 : 32;
    if (bits !== undefined && net.isIP(block)) return /^\d+$/.test(bits) && Number(bits) <= width && isInside(block, +bits);
    const [, bracketed, bare, wantedPort] = /^(?:\[([^\]]*)\]|([^:]*)|)(?::(\d+))?$/.exec(entry) ?? ["", entry];
    if (wantedPort !== undefined && wantedPort !== port) return false;
    const name = (bracketed ?? bare ?? "").replace(/^\*?\./, "");
    return name === "*" || (name !== "" && (host === name || (!isAddress && host.endsWith(`.${name}`))));
  });
}

function proxyFor(url: URL, environment: Environment): URL | undefined {
  const variable = (name: string) => environment[name] || environment[name.toLowerCase()] || "";
  const names = [url.protocol === "https:" ? "HTTPS_PROXY" : "HTTP_PROXY", "ALL_PROXY"];
  const name = names.find((each) => variable(each) !== "");
  if (name === undefined || isExemptFromProxy(url, variable("NO_PROXY"))) return undefined;
  const text = /^[a-z][a-z0-9+.-]*:\/\//i.test(variable(name)) ? variable(name) : `http://${variable(name)}`;
  if (!URL.canParse(text)) fail("PROXY", `${name} is not a URL`);
  const proxy = new URL(text);
  if (proxy.protocol === "http:" || proxy.protocol === "https:") return proxy;
  return fail("PROXY", `${name}: a ${proxy.protocol}// proxy is not supported, only http:// and https:// ones are`);
}

const basicAuthorization = (username: string, secret: string): string =>
  `Basic ${Buffer.from(`${username}:${secret}`, "utf8").toString("base64")}`;

function proxyHeaders({ username, password }: URL): Record<string, string> {
  const value = basicAuthorization(decodeURIComponent(username), decodeURIComponent(password));
  return username === "" ? {} : { "Proxy-Authorization": value };
}
const PROXY_REMEDY = "\n  the proxy wants credentials: http://USER:PASSWORD@HOST:PORT";
/** An agent whose connections are TLS inside a CONNECT tunnel (RFC 9110 §9.3.6). */
function tunnelAgent(proxy: URL, agent: https.Agent, proxyTls: tls.ConnectionOptions, timeout: number): https.Agent {
  const name = `the proxy ${proxy.protocol}//${proxy.host}`;
  type Callback = (error: Error | null, socket?: net.Socket) => void;
  const createConnection = (target: tls.ConnectionOptions, callback: Callback) => {
    const authority = `${net.isIPv6(String(target.host)) ? `[${target.host}]` : target.host}:${target.port}`;
    const headers = { Host: authority, ...proxyHeaders(proxy) };
    const options = { ...proxyTls, method: "CONNECT", path: authority, agent: false, timeout, headers };
    const connect = (proxy.protocol === "https:" ? https : http).request(proxy.origin, options);
    connect.once("connect", ({ statusCode: status, statusMessage = "" }, socket) => {
      if (status === 200) return callback(null, tls.connect({ ...target, socket }));
      socket.destroy();
      const remedy = status === 407 ? PROXY_REMEDY : "";
      const words = `${name} refused CONNECT ${authority}: ${status} ${printable(statusMessage)}${remedy}`;
      callback(new ImgpullError("PROXY", words, { status }));
    });
    connect.once("timeout", () => connect.destroy(new ImgpullError("TIMEOUT", `${name} is silent`)));
    connect.once("error", (error) => callback(connectionError(error, name)));
    connect.end();
  };
  return Object.assign(agent, { createConnection });
}

function createTransport(settings: Settings): Transport {
  const contextFor = secureContexts(settings);
  const agents = new Map<string, Promise<http.Agent>>();
  const { timeoutMs, environment, insecure } = settings;

  const makeAgent = async (url: URL, isRegistry: boolean, proxy: URL | undefined): Promise<http.Agent> => {
    const keepAlive = { keepAlive: true, scheduling: "lifo" as const };
    const isTlsProxy = proxy?.protocol === "https:";
    // Node takes the name to verify from the Host header, which is the target's, unless it is told.
    const servername = isTlsProxy && net.isIP(proxy.hostname) === 0 ? proxy.hostname : "";
    const proxyTls = isTlsProxy ? { secureContext: await contextFor(proxy, false), servername } : {};
    if (url.protocol === "http:" && !isTlsProxy) return new http.Agent(keepAlive);
    if (url.protocol === "http:") return new https.Agent({ ...keepAlive, ...proxyTls });
    const secureContext = await contextFor(url, isRegistry);
    const agent = new https.Agent({ ...keepAlive, secureContext, rejectUnauthorized: insecure !== true });
    return proxy ? tunnelAgent(proxy, agent, proxyTls, timeoutMs) : agent;
  };

  const sendOnce: SendOnce = async (request, url, headers) => {
    const { method, signal, body } = request;
    const doing = `${method} ${redactUrl(url)}`;
    const isRegistry = request.isRegistry(url.origin);
    const proxy = proxyFor(url, environment);
    const key = `${url.protocol} ${isRegistry ? url.host : ""} ${proxy?.href ?? ""}`;
    const agent = agents.get(key) ?? makeAgent(url, isRegistry, proxy);
    agents.set(key, agent);
    const forwarder = url.protocol === "http:" ? proxy : undefined; // plain HTTP goes to the proxy in absolute form
    const absolute = forwarder && { path: url.href, headers: { ...headers, Host: url.host, ...proxyHeaders(forwarder) } };
    const options: https.RequestOptions = { method, signal, agent: await agent, timeout: timeoutMs, headers, ...absolute };
    // Not the proxy's URL as it is: Node would make an Authorization header, for the registry, of its user and password.
    const peer = forwarder ? new URL(forwarder.origin) : url;
    return new Promise((resolve, reject) => {
      const outgoing = (peer.protocol === "https:" ? https : http).request(peer, options);
      let incoming: http.IncomingMessage | undefined;
      outgoing.once("response", (response) => resolve((incoming = response)));
      outgoing.once("error", (error) => {
        // A kept-alive connection that the server closed at the same moment: nothing was answered, so ask again.
        const isStale = outgoing.reusedSocket && errorCodeOf(error) === "ECONNRESET" && !incoming;
        if (isStale) resolve(sendOnce(request, url, headers));
        else reject(connectionError(error, doing));
      });
      outgoing.on("timeout", () => {
        // Silence that we asked for (the disk or the reader is slower than the line) is not the server's.
        if (incoming && incoming.readableLength > 0) return void outgoing.setTimeout(timeoutMs);
        (incoming ?? outgoing).destroy(new ImgpullError("TIMEOUT", `${doing}: nothing came for ${timeoutMs / 1000} s`));
      });
      outgoing.end(body);
    });
  };

  return {
    send: (request) => followRedirects(request, sendOnce),
    close: () => agents.forEach((agent) => void agent.then((ready) => ready.destroy(), () => undefined)),
  };
}

type SendOnce = (request: HttpRequest, url: URL, headers: Record<string, string>) => Promise<http.IncomingMessage>;
/** Follows redirects by hand: relative ones too, at most ten, never from https to http, never with a secret body. */
async function followRedirects(request: HttpRequest, sendOnce: SendOnce): Promise<Answer> {
  let { url } = request;
  for (let hop = 0; ; hop += 1) {
    const authorization = await request.authorizationFor(url.origin);
    const common = { "User-Agent": `imgpull/${IMGPULL_VERSION}`, "Accept-Encoding": "identity" };
    const allHeaders = { ...common, ...request.headers, ...given({ Authorization: authorization }) };
    const response = await sendOnce(request, url, allHeaders as Record<string, string>);
    const { statusCode: status = 0, headers, headers: { location } } = response;
    const answer = { status, headers, url, authorization, words: "" };
    if (status >= 200 && status < 300) return { ...answer, body: response };
    if (![301, 302, 303, 307, 308].includes(status) || location === undefined || request.body !== undefined) {
      return { ...answer, words: await readWords(response) };
    }
    response.on("error", () => undefined).resume();
    const from = redactUrl(url);
    if (hop >= LIMITS.redirects) fail("PROTOCOL", `${from}: more than ${LIMITS.redirects} redirects`);
    if (!URL.canParse(location, url)) fail("PROTOCOL", `${from} redirects to what is not a URL`);
    const next = new URL(location, url);
    if (next.protocol !== "https:" && (next.protocol !== "http:" || url.protocol === "https:")) {
      fail("PROTOCOL", `${from} redirects to ${redactUrl(next)}: not followed from https to ${next.protocol}`);
    }
    url = next;
  }
}
/**
 * Some front ends compress although `identity` was asked for. Others store a gzip layer with a Content-Encoding that
 * describes the layer itself: there the length gives it away, and the bytes are what was asked for.
 */
function decodeBody(response: http.IncomingMessage, expectedBytes?: number): Readable {
  const { "content-encoding": encoding = "", "content-length": length } = response.headers;
  const isRaw = expectedBytes !== undefined && Number(length) === expectedBytes;
  if (!/^(x-)?gzip$/i.test(encoding) || isRaw) return response;
  const decoded = zlib.createGunzip();
  response.once("error", (error) => decoded.destroy(error));
  return response.pipe(decoded.once("close", () => response.destroy()));
}
/** A whole body of at most `maximumBytes`; more is refused by name before it is held. */
async function readBody(response: http.IncomingMessage, maximumBytes: number, what: string): Promise<Buffer> {
  const tooLarge = `${what} is larger than ${maximumBytes} bytes`;
  const checkSize = (bytes: number) => bytes <= maximumBytes || fail("TOO_LARGE", tooLarge);
  const chunks: Buffer[] = [];
  let length = 0;
  try {
    checkSize(Number(response.headers["content-length"] ?? 0));
    for await (const chunk of decodeBody(response)) {
      chunks.push(chunk as Buffer);
      checkSize((length += (chunk as Buffer).length));
    }
  } catch (error) {
    response.destroy();
    throw connectionError(error, what);
  }
  return Buffer.concat(chunks);
}
/** The registry's own words: `errors[]` of the distribution specification, a token service's, or plain text. */
async function readWords(response: http.IncomingMessage): Promise<string> {
  const body = await readBody(response, LIMITS.errorBodyBytes, "the error's body").catch((error: ImgpullError) => {
    if (error.code === "ABORTED") throw error;
    return "";
  });
  const json = parseJson(body);
  if (!isRecord(json)) return /^\s*</.test(String(body)) ? "" : printable(String(body));
  const [first] = Array.isArray(json.errors) ? (json.errors as unknown[]) : [];
  const { code, message } = isRecord(first) ? first : {};
  const words = [code, message, json.details, json.message, json.error_description, json.error];
  return printable(words.filter((word) => typeof word === "string" && word !== "").slice(0, 2).join(": "));
}

// ====== 7. Retry ======
// Pure but for the clock, which tests replace. Only known passing faults are retried; a bug never is. SPEC §6.

type Clock = Readonly<{
  now: () => number; random: () => number; sleep: (milliseconds: number, signal: AbortSignal) => Promise<unknown>;
}>;

const sleep: Clock["sleep"] = (milliseconds, signal) => delay(milliseconds, undefined, { signal });
const systemClock: Clock = { now: Date.now, random: Math.random, sleep };
/** Retry-After is seconds or a date (RFC 9110 §10.2.3). */
function parseRetryAfter(value: string | undefined, now: number): number | undefined {
  if (/^\s*\d+\s*$/.test(value ?? "")) return Number(value) * 1000;
  const date = Date.parse(value ?? "");
  return Number.isNaN(date) ? undefined : Math.max(0, date - now);
}

const isMismatch = ({ code }: ImgpullError): boolean => code === "DIGEST_MISMATCH" || code === "SIZE_MISMATCH";

function isRetriable(error: unknown): error is ImgpullError {
  if (!(error instanceof ImgpullError)) return false;
  const { code, status = 0, retryAfterMs } = error;
  if (code === "NETWORK") return errorCodeOf(error.cause) !== "ENOTFOUND"; // a name that does not exist is a typo
  if (code === "TIMEOUT" || code === "RATE_LIMITED" || retryAfterMs !== undefined || isMismatch(error)) return true;
  const isServers = status === 408 || status === 425 || (status >= 500 && status !== 501 && status !== 505);
  return (code === "PROTOCOL" || code === "PROXY") && isServers;
}
/** How long to wait before the next attempt; undefined where there is none. `failures` counts those so far. */
function retryDelayMs(error: unknown, failures: number, retries: number, random: number): number | undefined {
  if (!isRetriable(error) || failures > (isMismatch(error) ? Math.min(1, retries) : retries)) return undefined;
  const { retryAfterMs = 0 } = error;
  const ceiling = Math.min(LIMITS.backoffMs, LIMITS.firstBackoffMs * 2 ** (failures - 1));
  return retryAfterMs > LIMITS.retryAfterMs ? undefined : Math.max(retryAfterMs, Math.round(ceiling * (0.5 + random / 2)));
}
/** What everything that a pull does has in common. Two pulls share nothing. */
interface Session {
  readonly settings: Settings;
  readonly transport: Transport;
  readonly clock: Clock;
  readonly signal: AbortSignal;
  /** What each origin asked for: the next repository there need not be refused first. */
  readonly challenges: Map<string, readonly Challenge[]>;
  /** One for each repository, so that its token is fetched once. */
  readonly registries: Map<string, Registry>;
  readonly warn: (message: string) => void;
}
/** Runs `attempt` until it succeeds. `gotOn` says whether the failed one brought us forward: the count starts anew. */
async function withRetries<T>(session: Session, attempt: () => Promise<T>, gotOn = () => false): Promise<T> {
  const { clock, settings: { retries }, signal } = session;
  for (let failures = 1; ; failures += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (signal.aborted) fail("ABORTED", "stopped", { cause: error });
      if (gotOn()) failures = 1;
      const waitMs = retryDelayMs(error, failures, retries, clock.random());
      if (waitMs === undefined) throw error;
      const [said] = (error as Error).message.split("\n");
      session.warn(`${said}; trying again in ${(waitMs / 1000).toFixed(1)} s (${failures} of ${retries})`);
      await clock.sleep(waitMs, signal).catch((cause: unknown) => fail("ABORTED", "stopped", { cause }));
    }
  }
}

// ====== 8. Credentials and tokens ======
// Challenges (RFC 9110 §11.6.1), docker's and podman's files, helpers, the distribution token protocol. SPEC §6, §7.
// Invariant: a credential is for one registry; it goes there and to the token endpoint which that registry names.

interface Challenge { readonly scheme: string; readonly parameters: Readonly<Record<string, string>> }
/** Every challenge of every header line: commas separate both parameters and challenges, and may be inside quotes. */
function parseChallenges(lines: readonly string[]): Challenge[] {
  const challenges: { scheme: string; parameters: Record<string, string> }[] = [];
  for (const line of lines) {
    const word = /([\s,]*)([!#$%&'*+.^_`|~0-9A-Za-z/-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"?|[^\s,"]*))?/y;
    let current: Record<string, string> | undefined;
    for (let match = word.exec(line); match !== null; match = word.exec(line)) {
      const [, separator = "", name = "", value] = match;
      if (value === undefined && (match.index === 0 || separator.includes(","))) {
        challenges.push({ scheme: name.toLowerCase(), parameters: (current = {}) });
      } else if (current && value !== undefined && !/^=*$/.test(value)) { // otherwise a token68, as Negotiate sends
        const unquoted = value.startsWith('"') ? value.replace(/^"|"$/g, "").replace(/\\(.)/g, "$1") : value;
        current[name.toLowerCase()] ??= unquoted;
      }
    }
  }
  return challenges;
}
/** `stored` ones come from a file or a helper: where they are refused, a public image can still be pulled. */
type Credential = Readonly<{
  kind: "basic" | "identity" | "bearer" | "outside"; username: string; secret: string; source: string; stored: boolean;
}>;
/** A credential file's key as host[/path]: docker writes URLs with /v1/, podman writes paths. */
function normalizeAuthKey(key: string): string {
  const [host = "", ...rest] = key.replace(/^https?:\/\//, "").replace(/\/(v1|v2)?\/?$/, "").split("/");
  return [HUB_HOSTS.includes(host) ? "docker.io" : host, ...rest].join("/");
}

function decodeAuthEntry(entry: Record<string, unknown>, source: string): Credential | undefined {
  const text = (name: string) => (typeof entry[name] === "string" ? entry[name] : "");
  const decoded = Buffer.from(text("auth"), "base64").toString("utf8").replace(/\0+$/, "");
  const [, user, word] = /^([^:]*):([^]*)$/.exec(decoded) ?? [];
  if (text("auth") !== "" && user === undefined) fail("CREDENTIALS", `${source}: its "auth" is not USER:PASSWORD in base64`);
  const [username, password] = [user ?? text("username"), word ?? text("password")];
  const [identity, bearer] = [text("identitytoken"), text("registrytoken")];
  const kind = identity ? "identity" : bearer ? "bearer" : "basic";
  const secret = identity || bearer || password;
  return username === "" && secret === "" ? undefined : { kind, username, secret, source, stored: true };
}
/** docker-credential-NAME: the server on stdin, JSON on stdout (docker/docker-credential-helpers). */
function runCredentialHelper(name: string, input: string, environment: Environment): Credential | undefined {
  const source = `docker-credential-${name}`;
  const refuse = (reason: string): never => fail("CREDENTIALS", `the credential helper ${printable(source)} ${reason}`);
  if (!/^[\w.+-]+$/.test(name)) refuse("has a name that is not one");
  const { status, stdout, stderr, error } = spawnSync(source, ["get"], {
    input, env: environment as NodeJS.ProcessEnv, encoding: "utf8", timeout: 60_000, maxBuffer: LIMITS.tokenBytes,
  });
  if (error) refuse(`cannot be run: ${errorCodeOf(error) === "ENOENT" ? "it is not on the PATH" : errorCodeOf(error)}`);
  const words = printable(stdout || stderr);
  if (status !== 0) return /credentials not found/i.test(words) ? undefined : refuse(`failed: ${words || `exit code ${status}`}`);
  const { Username: username = "", Secret: secret } = (parseJson(stdout) ?? refuse("answered what is not JSON")) as Record<string, unknown>;
  if (typeof username !== "string" || typeof secret !== "string") return refuse("answered without a Secret");
  const isIdentity = username === "<token>";
  const found = { username: isIdentity ? "" : username, secret, source, stored: true };
  return username === "" && secret === "" ? undefined : { kind: isIdentity ? "identity" : "basic", ...found };
}
/** The credential that one file has for a repository: its helper, its store, or the longest path in `auths`. */
function credentialIn(text: string, source: string, { host, repository }: Reference, environment: Environment) {
  const file = parseJson(text);
  if (!isRecord(file)) return fail("CREDENTIALS", `${source} is not a JSON object`);
  const bestIn = (entries: unknown, isUsable: (value: unknown) => boolean) => Object.entries(isRecord(entries) ? entries : {})
    .filter(([key, value]) => isUsable(value) && `${host}/${repository}/`.startsWith(`${normalizeAuthKey(key)}/`))
    .sort(([left], [right]) => normalizeAuthKey(right).length - normalizeAuthKey(left).length)[0]?.[1];
  const helper = bestIn(file.credHelpers, (value) => typeof value === "string") ?? file.credsStore;
  const server = host === "docker.io" ? "https://index.docker.io/v1/" : host;
  const found = typeof helper === "string" && helper !== "" ? runCredentialHelper(helper, server, environment) : undefined;
  const entry = bestIn(file.auths, (value) => isRecord(value) && Object.keys(value).length > 0);
  return found ?? (isRecord(entry) ? decodeAuthEntry(entry, source) : undefined);
}
/** SPEC §7's order. Every place is tried, and the first that knows the registry is taken. */
async function findCredential(settings: Settings, reference: Reference): Promise<Credential | undefined> {
  const { environment, token, username, password = "" } = settings;
  const { HOME: home = os.homedir(), DOCKER_CONFIG, XDG_RUNTIME_DIR, REGISTRY_AUTH_FILE: named } = environment;
  const option = { username: username ?? "", stored: false };
  if (token !== undefined) return { kind: "outside", secret: token, source: "--token", ...option };
  if (username !== undefined) return { kind: "basic", secret: password, source: "--user and --password", ...option };
  const file = async (name: string, what = `the credential file ${name}`, isRequired = false): Promise<[string, string | undefined]> =>
    [name, await readCredentialFile(name, what, isRequired)];
  const places: (() => Promise<[source: string, text: string | undefined]>)[] = [
    ...(named ? [() => file(named, `REGISTRY_AUTH_FILE names ${named}`, true)] : []),
    async () => ["DOCKER_AUTH_CONFIG", environment.DOCKER_AUTH_CONFIG],
    () => file(path.join(DOCKER_CONFIG || path.join(home, ".docker"), "config.json")),
    ...(XDG_RUNTIME_DIR ? [() => file(path.join(XDG_RUNTIME_DIR, "containers/auth.json"))] : []),
    () => file(path.join(home, ".config/containers/auth.json")),
  ];
  for (const place of places) {
    const [source, text] = await place();
    const found = text ? credentialIn(text, source, reference, environment) : undefined;
    if (found) return found;
  }
  return undefined;
}

async function readCredentialFile(file: string, what: string, isRequired: boolean): Promise<string | undefined> {
  try {
    if ((await fs.stat(file)).size <= LIMITS.credentialFileBytes) return await fs.readFile(file, "utf8");
  } catch (cause) {
    if (!isRequired && ["ENOENT", "ENOTDIR", "ERR_ACCESS_DENIED"].includes(errorCodeOf(cause))) return undefined;
    fail("CREDENTIALS", `${what}: ${diskWords(cause)}`, { cause });
  }
  return fail("CREDENTIALS", `${what}: too large for a credential file`);
}

interface Authorization { readonly header: string; readonly expiresAt: number }
/** A token for one repository (distribution specification, "Token Authentication"; OAuth2 for identity tokens). */
async function fetchToken(
  session: Session, origin: string, scope: string, challenge: Challenge, credential: Credential | undefined,
): Promise<Authorization> {
  const { realm = "", service } = challenge.parameters;
  if (realm === "" || !URL.canParse(realm, origin)) fail("PROTOCOL", `${origin} asks for a token and names no usable realm`);
  const url = new URL(realm, origin);
  const where = redactUrl(url);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && origin.startsWith("http:"))) {
    fail("PROTOCOL", `${origin} names the token endpoint ${where}: not over ${url.protocol}`);
  }
  const query = { ...given({ service }), scope };
  const ask = (method: string, target: URL, authorization: string | undefined, body?: string) => session.transport.send({
    method, url: target, signal: session.signal, ...given({ body }),
    headers: body === undefined ? {} : { "Content-Type": "application/x-www-form-urlencoded" },
    authorizationFor: async (each) => (each === target.origin ? authorization : undefined),
    isRegistry: (each) => each === origin,
  });
  let answer: Answer | undefined;
  if (credential?.kind === "identity") {
    const grant = { grant_type: "refresh_token", client_id: "imgpull", refresh_token: credential.secret };
    answer = await ask("POST", url, undefined, new URLSearchParams({ ...query, ...grant }).toString());
    // Services that know no POST say so in many ways; a redirect would want the secret sent elsewhere.
    if ([400, 401, 404, 405].includes(answer.status) || (answer.status >= 300 && answer.status < 400)) answer = undefined;
  }
  if (!answer) {
    const target = new URL(url);
    for (const [name, value] of Object.entries(query)) target.searchParams.set(name, value);
    const username = credential?.username || "00000000-0000-0000-0000-000000000000"; // ACR's, for tokens of its own
    answer = await ask("GET", target, credential && basicAuthorization(username, credential.secret));
  }
  if (!answer.body) throw statusError(answer, session.clock.now(), "the token service");
  const json = parseJson(await readBody(answer.body, LIMITS.tokenBytes, `the token of ${where}`));
  const { token, access_token: accessToken, expires_in: seconds } = isRecord(json) ? json : {};
  const text = token || accessToken;
  if (typeof text !== "string" || !/^[\x21-\x7e]+$/.test(text)) return fail("PROTOCOL", `${where} answered without a token`);
  const lifeMs = Math.max(LIMITS.tokenFloorMs, typeof seconds === "number" ? seconds * 1000 : 0);
  return { header: `Bearer ${text}`, expiresAt: session.clock.now() + lifeMs };
}
/** What a status means, with the words of the one who said it. */
function statusError({ status, words, headers, url }: Answer, now: number, who: string, isRegistry = true): ImgpullError {
  const retryAfterMs = parseRetryAfter(headers["retry-after"], now);
  const said = `${redactUrl(url)}: ${who} answered ${status}${words ? ` (${words})` : ""}`;
  if (status === 429) {
    const when = retryAfterMs === undefined ? "try again later"
      : `come back in ${Math.ceil(retryAfterMs / 1000)} s, at ${new Date(now + Math.min(retryAfterMs, 1e12)).toISOString()}`;
    return new ImgpullError("RATE_LIMITED", `${said}\n  too many requests: ${when}`, { status, retryAfterMs } as ErrorDetails);
  }
  if (status === 407) return new ImgpullError("PROXY", said + PROXY_REMEDY, { status });
  // A storage host's refusal is a signed URL that has expired: asking the registry again gives a new one.
  const isExpired = !isRegistry && [400, 401, 403].includes(status);
  const code = ({ 401: "UNAUTHORIZED", 403: "FORBIDDEN", 404: "NOT_FOUND" } as const)[status] ?? "PROTOCOL";
  const remedy = /HTTP request (was sent )?to (an )?HTTPS/i.test(words) ? "\n  this port is https: try without --scheme http" : "";
  const details: ErrorDetails = { status, retryAfterMs: isExpired ? 0 : status >= 500 ? retryAfterMs : undefined };
  return new ImgpullError(code, said + remedy, details);
}

// ====== 9. Registry ======
// One repository of one registry: manifests and blobs from an offset, with whatever handshake it wants. SPEC §6.

interface FetchedManifest { readonly mediaType: string; readonly digest: string; readonly bytes: Buffer }

class Registry {
  readonly reference: Reference;
  readonly origin: string;
  /** False once it has answered a range with the whole. */
  acceptsRanges = true;
  /** The quickest answer so far: how far away it is. */
  latencyMs = NEVER;
  readonly #session: Session;
  readonly #held = new Map<string, Authorization>();
  readonly #renewals = new Map<string, Promise<boolean>>();
  #found: Promise<Credential | undefined> | undefined;
  #isAnonymous = false;

  constructor(session: Session, reference: Reference) {
    const { scheme, token } = session.settings;
    this.#session = session;
    this.reference = reference;
    this.origin = new URL(`${scheme}://${apiHost(reference.host)}`).origin;
    if (token !== undefined) this.#held.set(this.origin, { header: `Basic ${token}`, expiresAt: NEVER });
  }
  /** One answer to one request, after at most one handshake, one renewal and one fallback. */
  async #request(method: string, rest: string, headers: Record<string, string>, signal: AbortSignal): Promise<Answer> {
    const url = new URL(`${this.origin}/v2/${this.reference.repository}/${rest}`);
    const { namespace } = this.#session.settings;
    if (namespace !== undefined) url.searchParams.set("ns", namespace);
    const authorizationFor = (origin: string) => this.#authorizationFor(origin);
    const isRegistry = (origin: string) => origin === this.origin;
    for (let round = 0; ; round += 1) {
      const answer = await this.#session.transport.send({ method, url, headers, signal, authorizationFor, isRegistry });
      const { status, authorization: sent } = answer;
      // ECR Public answers a stale token with 400, GHCR a stale credential for a public image with 403.
      const isStale = sent !== undefined && ((status === 400 && sent.startsWith("Bearer ")) || status === 403);
      if (!(status === 401 || isStale) || round === 3 || !(await this.#authorize(answer, round))) return answer;
    }
  }

  async #authorizationFor(origin: string): Promise<string | undefined> {
    const held = this.#held.get(origin);
    if (held && held.expiresAt > this.#session.clock.now()) return held.header;
    const isBearer = this.#session.challenges.get(origin)?.some(({ scheme }) => scheme === "bearer");
    if (isBearer) await this.#handshake(origin);
    return this.#held.get(origin)?.header;
  }
  /** Whether another attempt may go better than the one that got `answer`. */
  async #authorize(answer: Answer, round: number): Promise<boolean> {
    const { url: { origin }, authorization: sent, status, headers } = answer;
    if (this.#held.get(origin)?.header !== sent) return true; // another connection has renewed it meanwhile
    const challenges = parseChallenges([headers["www-authenticate"] ?? []].flat());
    // nvcr.io names another realm, of no use to us, once a token has expired: the one that served goes first.
    const isRenewal = round === 0 && sent !== undefined && this.#session.challenges.has(origin);
    if (challenges.length > 0 && !isRenewal) this.#session.challenges.set(origin, challenges);
    const credential = await this.#credentialFor(origin);
    if (credential?.kind === "outside") return false;
    if (status === 403 || (round > 0 && sent !== undefined) || sent?.startsWith("Basic ")) {
      if (!credential?.stored) return false;
      this.#giveUp(credential, `${redactUrl(answer.url)}: ${status}`);
    }
    return this.#handshake(origin);
  }
  /** Looked up when a registry asks for it first; storage hosts and other origins never get it. */
  async #credentialFor(origin: string): Promise<Credential | undefined> {
    if (this.#isAnonymous || origin !== this.origin) return undefined;
    return (this.#found ??= findCredential(this.#session.settings, this.reference));
  }

  #giveUp({ source }: Credential, reason: string): void {
    this.#isAnonymous = true;
    this.#held.delete(this.origin);
    this.#session.warn(`the credentials of ${source} were refused (${reason}); trying without any`);
  }
  /** Connections that are refused at the same time get one new token between them. */
  #handshake(origin: string): Promise<boolean> {
    const running = this.#renewals.get(origin)
      ?? this.#answerChallenge(origin).finally(() => this.#renewals.delete(origin));
    this.#renewals.set(origin, running);
    return running;
  }

  async #answerChallenge(origin: string): Promise<boolean> {
    const challenges = this.#session.challenges.get(origin) ?? [];
    const credential = await this.#credentialFor(origin);
    const bearer = challenges.find(({ scheme }) => scheme === "bearer");
    const isBasic = challenges.some(({ scheme }) => scheme === "basic") && credential?.kind === "basic";
    if (!bearer && !isBasic) return false;
    if (!bearer || credential?.kind === "bearer") {
      const { username, secret } = credential as Credential;
      const header = bearer ? `Bearer ${secret}` : basicAuthorization(username, secret);
      this.#held.set(origin, { header, expiresAt: NEVER });
      return true;
    }
    // The target of a redirect has repositories of its own, and says which one it wants.
    const ours = `repository:${this.reference.repository}:pull`;
    const scope = origin === this.origin ? ours : (bearer.parameters.scope ?? ours);
    const ask = (holder?: Credential) => fetchToken(this.#session, origin, scope, bearer, holder);
    this.#held.set(origin, await ask(credential).catch(async (error: ImgpullError) => {
      if (![400, 401, 403, 404].includes(error.status ?? 0)) throw error;
      if (!credential?.stored) throw error.status === 401 || credential ? await this.#withTried(error) : error;
      this.#giveUp(credential, error.message);
      return ask().catch(async (refusal: ImgpullError) => {
        throw refusal.status === 401 ? await this.#withTried(refusal) : refusal;
      });
    }));
    return true;
  }
  /** The error with the word of which credentials were tried, and from where. */
  async #withTried({ code, message, status }: ImgpullError): Promise<ImgpullError> {
    const credential = await this.#credentialFor(this.origin);
    const tried = this.#isAnonymous ? `the stored credentials (${(await this.#found)?.source}) were refused, and so was a request without any`
      : credential ? `refused: the credentials of ${credential.source}`
      : "no credentials were found for this registry (--user, --token, docker login); " +
        "a repository that does not exist is often answered the same way";
    return new ImgpullError(code === "FORBIDDEN" ? code : "UNAUTHORIZED", `${message}\n  ${tried}`, { status });
  }
  /** A refusal in the user's terms. */
  async #refusal(answer: Answer, what: string): Promise<ImgpullError> {
    const isRegistry = answer.url.origin === this.origin;
    const who = isRegistry ? "the registry" : "the storage host";
    const error = statusError(answer, this.#session.clock.now(), who, isRegistry);
    const isName = /NAME_UNKNOWN|repository name not known/i.test(answer.words);
    const missing = isName ? `repository: ${this.reference.host}/${this.reference.repository}` : what;
    const { code, status, retryAfterMs } = error;
    const doubt = answer.headers["content-type"]?.includes("html") ? `: is ${this.reference.host} a registry?` : "";
    if (code === "NOT_FOUND") return new ImgpullError(code, `no such ${missing}\n  ${error.message}${doubt}`, { status });
    const isOurs = (code === "UNAUTHORIZED" || code === "FORBIDDEN") && retryAfterMs === undefined;
    return isOurs ? this.#withTried(error) : error;
  }
  /** One attempt at a manifest's answer; it has a body. */
  async #manifestAnswer(method: string, tagOrDigest: string): Promise<Answer> {
    const accept = { Accept: MANIFEST_TYPES.join(", ") };
    const answer = await this.#request(method, `manifests/${tagOrDigest}`, accept, this.#session.signal);
    const { host, repository } = this.reference;
    const what = isDigest(tagOrDigest) ? `manifest: ${tagOrDigest}` : `tag: ${host}/${repository}:${tagOrDigest}`;
    if (!answer.body) throw await this.#refusal(answer, what);
    return answer;
  }
  /** The manifest of a tag or digest, verified against the digest where one was asked for. */
  manifest(tagOrDigest: string): Promise<FetchedManifest> {
    return withRetries(this.#session, async () => {
      const startedAt = performance.now();
      const { body, url, headers } = await this.#manifestAnswer("GET", tagOrDigest);
      this.latencyMs = Math.min(this.latencyMs, performance.now() - startedAt);
      const where = redactUrl(url);
      const bytes = await readBody(body as http.IncomingMessage, LIMITS.manifestBytes, `the manifest ${where}`);
      const digest = digestOf(bytes, isDigest(tagOrDigest) ? tagOrDigest : undefined);
      const isWrong = isDigest(tagOrDigest) && digest !== tagOrDigest;
      if (isWrong) fail("DIGEST_MISMATCH", `${where}: the manifest's bytes have the digest ${digest}`);
      const mediaType = sniffMediaType(bytes, headers["content-type"]);
      if (mediaType !== undefined) return { mediaType, digest, bytes };
      const type = printable(headers["content-type"] ?? "nothing named", 80);
      return fail("PROTOCOL", `${where}: the answer is not a manifest but ${type}: is ${this.reference.host} a registry?`);
    });
  }
  /** What HEAD tells of a manifest; undefined where the registry leaves something out. */
  head(tagOrDigest: string): Promise<{ mediaType: string; digest: string; size: number } | undefined> {
    return withRetries(this.#session, async () => {
      const { headers, body } = await this.#manifestAnswer("HEAD", tagOrDigest);
      body?.resume();
      const { "docker-content-digest": digest, "content-length": length = "", "content-type": type = "" } = headers;
      const mediaType = type.split(";")[0]?.trim() ?? "";
      const isWhole = isDigest(digest) && Number(length) > 0 && MANIFEST_TYPES.includes(mediaType);
      return isWhole ? { mediaType, digest, size: Number(length) } : undefined;
    });
  }
  /** One answer, with a body, to a request for a blob's bytes [from, to). The caller checks what comes. */
  async blob({ digest, size, urls = [] }: Descriptor, from: number, to: number, signal: AbortSignal): Promise<Answer> {
    const headers: Record<string, string> = from === 0 && to === size ? {} : { Range: `bytes=${from}-${to - 1}` };
    let answer = await this.#request("GET", `blobs/${digest}`, headers, signal);
    if (answer.body) return answer;
    const foreign = answer.status === 404 ? urls.filter((url) => URL.canParse(url) && url.startsWith("https:")) : [];
    if (foreign.length === 0) throw await this.#refusal(answer, `blob: ${digest}`);
    for (const url of foreign) {
      const anyone = { authorizationFor: async () => undefined, isRegistry: () => false };
      answer = await this.#session.transport.send({ method: "GET", url: new URL(url), headers, signal, ...anyone });
      if (answer.body) return answer;
    }
    throw statusError(answer, this.#session.clock.now(), "the foreign layer's host");
  }
}

function registryOf(session: Session, reference: Reference): Registry {
  const key = `${reference.host}/${reference.repository}`;
  const registry = session.registries.get(key) ?? new Registry(session, reference);
  session.registries.set(key, registry);
  return registry;
}
/** The media type by the JSON itself, then by the header: registries label manifests text/plain and worse. */
function sniffMediaType(bytes: Buffer, contentType = ""): string | undefined {
  const header = contentType.split(";")[0]?.trim().toLowerCase() ?? "";
  const json = parseJson(bytes);
  if (!isRecord(json)) return undefined;
  if (typeof json.mediaType === "string") return json.mediaType;
  if (json.schemaVersion === 1) return DOCKER_SCHEMA_1;
  if (MANIFEST_TYPES.includes(header)) return header;
  return Array.isArray(json.manifests) ? OCI_INDEX : isRecord(json.config) ? OCI_MANIFEST : undefined;
}

// ====== 10. Manifests and platforms ======
// One shape for Docker and OCI. Everything that a registry says of digests and sizes is checked here. SPEC §3.

interface ImageManifest { readonly kind: "image"; readonly config: Descriptor; readonly layers: readonly Descriptor[] }
interface IndexManifest { readonly kind: "index"; readonly manifests: readonly Descriptor[] }

function parseDescriptor(value: unknown, where: string): Descriptor {
  const refuse = (reason: string): never => fail("PROTOCOL", `${where}: ${reason}`);
  if (!isRecord(value)) return refuse("a descriptor is not an object");
  const { mediaType: type, digest, size, urls, platform: words } = value;
  if (!isDigest(digest)) return refuse(`"${printable(String(digest), 100)}" is not a digest that is safe to use`);
  if (typeof size !== "number" || !Number.isSafeInteger(size) || size < 0) {
    return refuse(`${digest} has the size ${printable(JSON.stringify(size) ?? "none", 40)}, which is not a number of bytes`);
  }
  const isUrlList = Array.isArray(urls) && urls.length > 0 && urls.every((url) => typeof url === "string");
  const platform = isRecord(words) ? parsePlatform(words) : undefined;
  const mediaType = typeof type === "string" ? type : "";
  return { mediaType, digest, size, ...given({ urls: isUrlList ? (urls as string[]) : undefined, platform }) };
}

function parsePlatform(value: Record<string, unknown>): Platform {
  const word = (name: string) => (typeof value[name] === "string" ? printable(value[name], 64) : "");
  return { os: word("os"), architecture: word("architecture"), ...given({ variant: word("variant") }) };
}

function parseManifest({ bytes, mediaType }: FetchedManifest, where: string): ImageManifest | IndexManifest {
  const json = parseJson(bytes);
  if (!isRecord(json)) return fail("PROTOCOL", `${where}: the manifest is not a JSON object`);
  if (json.schemaVersion === 1 || mediaType.startsWith(DOCKER_SCHEMA_1)) {
    fail("UNSUPPORTED", `${where}: a schema 1 manifest, a format that Docker itself has given up: push the image anew`);
  }
  if (mediaType === "application/vnd.oci.artifact.manifest.v1+json") {
    fail("UNSUPPORTED", `${where}: an OCI artifact manifest, a draft that the specification has withdrawn`);
  }
  const { manifests, layers } = json;
  const isIndex = Array.isArray(manifests);
  const isImage = isRecord(json.config) && Array.isArray(layers);
  const isOther = MANIFEST_TYPES.includes(mediaType) && INDEX_TYPES.includes(mediaType) !== isIndex;
  // One document read as two things by two readers is an attack (CVE-2021-41190).
  if (isIndex === isImage || (isIndex && Array.isArray(layers)) || isOther) {
    fail("PROTOCOL", `${where}: ${printable(mediaType, 100)} with the fields of something else`);
  }
  const tooLarge = (what: string) => fail("TOO_LARGE", `${where}: ${what}`);
  if (isIndex) {
    if (manifests.length > LIMITS.indexEntries) tooLarge(`an index of more than ${LIMITS.indexEntries} entries`);
    return { kind: "index", manifests: manifests.map((entry) => parseDescriptor(entry, where)) };
  }
  const config = parseDescriptor(json.config, where);
  if (config.size > LIMITS.configBytes) tooLarge(`its config of ${config.size} bytes is larger than ${LIMITS.configBytes}`);
  return { kind: "image", config, layers: (layers as unknown[]).map((layer) => parseDescriptor(layer, where)) };
}
/** This machine, in Go's words. */
function hostPlatform(): Platform {
  const { arch, platform } = process;
  const systems: Record<string, string> = { win32: "windows", sunos: "solaris" };
  const ppc64 = os.endianness() === "LE" ? "ppc64le" : "ppc64";
  const processors: Record<string, string> = { x64: "amd64", ia32: "386", mipsel: "mipsle", ppc64 };
  const { arm_version: version = "7" } = process.config.variables as { arm_version?: string };
  const variant = arch === "arm" ? `v${version}` : undefined;
  return { os: systems[platform] ?? platform, architecture: processors[arch] ?? arch, ...given({ variant }) };
}
/** Variants that serve, best first; "" is an entry without one. containerd's platforms package has the same order. */
function acceptableVariants(architecture: string, variant: string | undefined): string[] {
  // The lowest that is tried, and what an entry without a variant is by convention.
  const [lowest, plain] = ({ arm: [5, 7], arm64: [8, 8], amd64: [1, 1] } as Record<string, number[]>)[architecture] ?? [];
  if (lowest === undefined) return variant === undefined ? ["", "*"] : [variant];
  const level = Number(/^v(\d{1,2})$/.exec(variant ?? `v${plain}`)?.[1]);
  if (Number.isNaN(level)) return [variant as string];
  const down = Array.from({ length: Math.max(0, level - lowest + 1) }, (_, index) => level - index);
  return variant === undefined ? ["", ...down.map((each) => `v${each}`)]
    : down.flatMap((each) => (each === plain ? [`v${each}`, ""] : [`v${each}`]));
}

function matchPlatform(candidates: readonly Descriptor[], wanted: Platform): Descriptor | undefined {
  const fitting = candidates.filter(
    ({ platform }) => platform?.os === wanted.os && platform.architecture === wanted.architecture);
  const ofVariant = (variant: string) =>
    fitting.find(({ platform }) => variant === "*" || (platform?.variant ?? "") === variant);
  return acceptableVariants(wanted.architecture, wanted.variant).map(ofVariant).find((found) => found !== undefined);
}
/** The platform to look for: what was asked, the rest from this machine (whose variant goes with its processor). */
function wantedPlatform(wanted: Partial<Platform>, host = hostPlatform()): Platform {
  const variant = wanted.variant ?? (wanted.architecture === undefined ? host.variant : undefined);
  return { os: wanted.os ?? host.os, architecture: wanted.architecture ?? host.architecture, ...given({ variant }) };
}

// ====== 11. Tar ======
// POSIX pax: a pure header encoder, the plan of a whole tar before its first byte, a reader for any tar. SPEC §4.
// Invariant: the same digests give the same plan, and the plan gives the same bytes, on every machine.

const BLOCK = 512;
const paddingOf = (sizeBytes: number): number => (BLOCK - (sizeBytes % BLOCK)) % BLOCK;
/** The ustar header of a regular file, its fields in order; name and size must fit. */
function encodeUstarHeader(name: string, sizeBytes: number, type: "0" | "x"): Buffer {
  const octal = (value: number, width: number) => `${value.toString(8).padStart(width - 1, "0")}\0`;
  const fields: [width: number, text: string][] = [
    [100, name], [8, octal(0o644, 8)], [8, octal(0, 8)], [8, octal(0, 8)], [12, octal(sizeBytes, 12)],
    [12, octal(0, 12)], [8, " ".repeat(8)], [1, type], [100, ""], [6, "ustar\0"], [2, "00"], [32, ""], [32, ""],
    [8, octal(0, 8)], [8, octal(0, 8)], [155, ""], [12, ""],
  ];
  const header = Buffer.concat(fields.map(([width, text]) => Buffer.concat([Buffer.from(text, "latin1")], width)));
  header.write(`${octal(sumOf(header, (byte) => byte), 7)} `, 148, "latin1");
  return header;
}
/** Header of an entry; names above 100 bytes and sizes from 8 GiB need a pax extended header before it. */
function encodeTarHeader(name: string, sizeBytes: number): Buffer {
  const record = (key: string, value: string) => {
    const rest = ` ${key}=${value}\n`;
    let length = rest.length;
    while (`${length}`.length + rest.length !== length) length = `${length}`.length + rest.length; // it counts itself
    return `${length}${rest}`;
  };
  const isLarge = sizeBytes > 0o77777777777;
  const plain = encodeUstarHeader(name.slice(0, 100), isLarge ? 0 : sizeBytes, "0");
  const records = (name.length > 100 ? record("path", name) : "") + (isLarge ? record("size", `${sizeBytes}`) : "");
  if (records === "") return plain;
  const padded = Buffer.concat([Buffer.from(records, "latin1")], records.length + paddingOf(records.length));
  return Buffer.concat([encodeUstarHeader("PaxHeaders/blob", records.length, "x"), padded, plain]);
}
/** One image of a reference. Its config is read already where the platform had to be looked up in it. */
interface ImageContent { readonly manifest: ImageManifest; readonly platform?: Platform; readonly configBytes?: Buffer }
/** What one reference came to: the manifests to keep, `top` (what index.json points at) first, and the images. */
type ResolvedImage = Readonly<{
  reference: Reference; name: string; registry: Registry; top: FetchedManifest; manifests: readonly FetchedManifest[];
  contents: readonly ImageContent[]; platform: string;
}>;
/**
 * One file of the tar or directory. Its content is `bytes`, or a blob that `registry` has, and begins at `offset` of
 * the tar; `lead` is the padding of the entry before and this one's header.
 */
interface PlanEntry {
  readonly name: string;
  readonly sizeBytes: number;
  readonly lead: Buffer;
  readonly offset: number;
  readonly bytes?: Buffer;
  readonly blob?: { readonly descriptor: Descriptor; readonly registry: Registry };
}
/**
 * Everything that will be in DEST, known before a byte of a layer: tar, stream and directory are made from it. Two
 * plans with the same `id` put the same bytes at the same offsets. `omitted` layers are those that --since left out.
 */
type Plan = Readonly<{
  entries: readonly PlanEntry[]; trailer: Buffer; sizeBytes: number; blobBytes: number; id: string;
  omitted: readonly Descriptor[];
}>;

const blobPath = (digest: string): string => `blobs/${digest.replace(":", "/")}`;
/** index.json's entry: both annotations, since containerd reads the one and skopeo and podman the other. */
function indexEntry({ name, top }: ResolvedImage): unknown {
  const annotations = { "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name };
  return { mediaType: top.mediaType, digest: top.digest, size: top.bytes.length, annotations };
}
/** manifest.json's entry, what `docker load` reads: one image for each name. Classic docker cannot name a digest. */
function dockerEntry({ name, contents }: ResolvedImage): unknown {
  const images = contents.filter(({ manifest }) => CONFIG_TYPES.includes(manifest.config.mediaType));
  const image = images.find(({ platform }) => formatPlatform(platform) === "linux/amd64") ?? images[0];
  if (!image) return undefined;
  const { config, layers } = image.manifest;
  const tags = name.includes("@") ? [] : [name];
  return { Config: blobPath(config.digest), RepoTags: tags, Layers: layers.map(({ digest }) => blobPath(digest)) };
}
/** `omit` has the digests of layers that the receiving side holds already. */
function planTar(images: readonly ResolvedImage[], omit: ReadonlySet<string> = new Set()): Plan {
  const contents = new Map<string, Pick<PlanEntry, "sizeBytes" | "bytes" | "blob">>();
  const addBytes = (name: string, bytes: Buffer) => contents.set(name, { sizeBytes: bytes.length, bytes });
  const omitted = new Map<string, Descriptor>();
  addBytes("oci-layout", encodeJson({ imageLayoutVersion: "1.0.0" }));
  addBytes("index.json", encodeJson({ schemaVersion: 2, mediaType: OCI_INDEX, manifests: images.map(indexEntry) }));
  addBytes("manifest.json", encodeJson(images.map(dockerEntry).filter((entry) => entry !== undefined)));
  for (const { manifests, contents: parts, registry } of images) {
    for (const { digest, bytes } of manifests) addBytes(blobPath(digest), bytes);
    for (const { manifest: { config, layers }, configBytes } of parts) {
      for (const descriptor of [config, ...layers]) {
        const { digest, size } = descriptor;
        const planned = contents.get(blobPath(digest))?.sizeBytes ?? size;
        if (planned !== size) fail("SIZE_MISMATCH", `${digest} is said to have ${size} bytes here and ${planned} there`);
        if (contents.has(blobPath(digest))) continue;
        if (descriptor === config && configBytes) addBytes(blobPath(digest), configBytes);
        else if (descriptor !== config && omit.has(digest)) omitted.set(digest, descriptor);
        else contents.set(blobPath(digest), { sizeBytes: size, blob: { descriptor, registry } });
      }
    }
  }
  const entries: PlanEntry[] = [];
  const identity = createHash("sha256");
  let [padding, offset, blobBytes] = [0, 0, 0];
  for (const [name, content] of contents) {
    const lead = Buffer.concat([Buffer.alloc(padding), encodeTarHeader(name, content.sizeBytes)]);
    offset += lead.length;
    entries.push({ name, lead, offset, ...content });
    identity.update(lead).update(content.bytes ?? "");
    if (content.blob) blobBytes += content.sizeBytes;
    offset += content.sizeBytes;
    padding = paddingOf(content.sizeBytes);
  }
  const trailer = Buffer.alloc(padding + 2 * BLOCK);
  const sizeBytes = offset + trailer.length;
  return { entries, trailer, sizeBytes, blobBytes, id: identity.digest("hex"), omitted: [...omitted.values()] };
}

type TarEntry = Readonly<{ name: string; sizeBytes: number; offset: number; type: string; linkName: string }>;
/** Reads up to `length` bytes; fewer only at the end of the file. */
async function readAt(handle: fs.FileHandle, position: number, length: number, buffer = Buffer.alloc(length)) {
  for (let filled = 0; ; ) {
    const { bytesRead } = await handle.read(buffer, filled, length - filled, position + filled);
    filled += bytesRead;
    if (bytesRead === 0 || filled === length) return buffer.subarray(0, filled);
  }
}
/** The entries of a tar that anyone made: ustar, pax, and GNU's long names and base-256 sizes. */
async function* readTar(handle: fs.FileHandle, where: string): AsyncGenerator<TarEntry> {
  const refuse = (reason: string): never => fail("BAD_TAR", `${where}: ${reason}`);
  const { size } = await handle.stat();
  let extended: Record<string, string> = {};
  for (let position = 0; position < size; ) {
    const header = await readAt(handle, position, BLOCK);
    if (header.length < BLOCK) refuse("it ends in the middle of a header");
    if (header.every((byte) => byte === 0)) return;
    const text = (start: number, length: number) => untilNul(header.subarray(start, start + length));
    const checksum = sumOf(header, (byte) => byte) - sumOf(header.subarray(148, 156), (byte) => byte - 32);
    if (Number.parseInt(text(148, 8).trim(), 8) !== checksum) refuse("it is not a tar, or is damaged (a header's checksum)");
    // GNU writes a size of 8 GiB and more as a big-endian number behind a set top bit.
    const isBinary = ((header[124] ?? 0) & 0x80) !== 0;
    const plainSize = isBinary ? Number(header.readBigUInt64BE(128)) : Number.parseInt(text(124, 12).trim() || "0", 8);
    const type = text(156, 1) || "0";
    const isExtension = "xgLK".includes(type);
    const sizeBytes = isExtension ? plainSize : Number(extended.size ?? plainSize);
    const offset = position + BLOCK;
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 0) refuse("an entry's size is not a number");
    if (offset + sizeBytes > size) refuse("it ends in the middle of an entry: it was cut off");
    position = offset + sizeBytes + paddingOf(sizeBytes);
    if (isExtension) {
      if (sizeBytes > LIMITS.tarMetadataBytes) refuse("an extended header is too large");
      const body = await readAt(handle, offset, sizeBytes);
      if (type === "x") Object.assign(extended, parsePaxRecords(body));
      else if (type !== "g") extended[type === "L" ? "path" : "linkpath"] = untilNul(body);
      continue;
    }
    const prefix = header.toString("latin1", 257, 263) === "ustar\0" ? text(345, 155) : "";
    const name = extended.path ?? (prefix ? `${prefix}/${text(0, 100)}` : text(0, 100));
    yield { name: name.replace(/^\.\//, ""), sizeBytes, offset, type, linkName: extended.linkpath ?? text(157, 100) };
    extended = {};
  }
}

const untilNul = (bytes: Buffer): string => bytes.toString("utf8").split("\0", 1)[0] ?? "";

function parsePaxRecords(body: Buffer): Record<string, string> {
  const records: Record<string, string> = {};
  for (let at = 0; at < body.length; ) {
    const space = body.indexOf(0x20, at);
    const length = Number(body.toString("latin1", at, Math.max(space, at)));
    if (space < 0 || !Number.isInteger(length) || length <= space - at) break;
    const [key = "", ...value] = body.toString("utf8", space + 1, at + length - 1).split("=");
    records[key] = value.join("=");
    at += length;
  }
  return records;
}
/** A tar at hand. What its names claim of digests is believed only after hashing. */
type OpenTar = Readonly<{
  handle: fs.FileHandle; entries: ReadonlyMap<string, TarEntry>; blobs: ReadonlyMap<string, TarEntry>;
}>;
/** Our tars, OCI archives and new docker ones have blobs/sha256/HEX, crane HEX.tar.gz, skopeo HEX.tar and HEX.json. */
function digestInName(name: string): string | undefined {
  const [, blob, bare] = /^(?:blobs\/(sha\d+\/[0-9a-f]+)|(?:sha256:)?([0-9a-f]{64})(?:\.json|\.tar|\.tar\.gz)?)$/.exec(name) ?? [];
  const digest = blob?.replace("/", ":") ?? `sha256:${bare}`;
  return isDigest(digest) ? digest : undefined;
}

async function openTar(file: string): Promise<OpenTar> {
  const handle = await onDisk(`cannot read ${file}`, fs.open(file, "r"));
  try {
    const [entries, blobs] = [new Map<string, TarEntry>(), new Map<string, TarEntry>()];
    for await (const entry of readTar(handle, file)) {
      const digest = digestInName(entry.name);
      entries.set(entry.name, entry);
      if (digest !== undefined && (entry.type === "0" || entry.type === "7")) blobs.set(digest, entry);
    }
    return { handle, entries, blobs };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

// ====== 12. Pull ======
// Plan → bytes in place → verify → rename. Blobs are fetched side by side into DEST.partial and hashed in order as they
// come; idle connections take over half of the longest remaining range. SPEC §5.
// Invariant: nothing has DEST's name before every byte of it was hashed and compared.

type Range = [from: number, to: number];
const lengthOf = (ranges: readonly Range[]): number => sumOf(ranges, ([from, to]) => to - from);
/** Adds a range to a sorted list of disjoint ones. */
function addRange(ranges: readonly Range[], [from, to]: Range): Range[] {
  const isApart = ([start, end]: Range) => end < from || start > to;
  const edges = [from, to, ...ranges.filter((range) => !isApart(range)).flat()];
  const merged: Range = [Math.min(...edges), Math.max(...edges)];
  return [...ranges.filter(isApart), merged].sort((left, right) => left[0] - right[0]);
}

function missingRanges(ranges: readonly Range[], sizeBytes: number): Range[] {
  const ends = [...ranges.map(([start]) => start), sizeBytes];
  const gaps = [0, ...ranges.map(([, end]) => end)].map((start, at): Range => [start, ends[at] as number]);
  return gaps.filter(([from, to]) => from < to);
}
/** A tar at hand that claims to hold a blob, from `offset` on. */
interface Origin { readonly handle: fs.FileHandle; readonly offset: number }
/** A blob on its way to `offset` of the tar, or to 0 of a file of its own. */
interface BlobJob {
  readonly descriptor: Descriptor; readonly registry: Registry; readonly offset: number;
  /** The first is read in the registry's stead, and dropped if it lied. */
  readonly origins: Origin[];
  /** Bytes below `hashedTo` are in place and hashed; `hashing` runs while others are read from disk for that. */
  hash: Hash; hashedTo: number; hashing: Promise<void> | undefined;
  written: Range[]; unrecordedBytes: number; doneBytes: number; openSegments: number; isDone: boolean;
  /** Fetches from the start that are left after bytes turned out wrong. */
  freshStarts: number;
}
/** A range that one connection fetches: `at` is the next byte, and `to` comes down when another takes the end over. */
interface Segment {
  readonly job: BlobJob; readonly isTakeover: boolean;
  at: number; to: number;
  startedAtMs: number; firstByteMs: number; receivedBytes: number;
}
/** Where bytes go: files hash as bytes come and again from disk where they came out of order, a stream in order. */
interface Sink {
  readonly isSplitting: boolean;
  /** The longest range asked for in one request. */
  readonly unitBytes: (job: BlobJob) => number;
  readonly accept: (job: BlobJob, position: number, chunk: Buffer) => void;
  readonly write: (job: BlobJob, position: number, chunks: Buffer[]) => Promise<void>;
  readonly segmentDone: (job: BlobJob) => void;
  /** All bytes of the blob were written; false asks for them once more. */
  readonly blobDone: (job: BlobJob) => Promise<boolean>;
}

type Observer = (transfer: Transfer, finished?: BlobJob) => void;
/** One use of the line: what is to come, what nobody fetches yet, what is under way, and what it came to. */
interface Transfer {
  readonly jobs: readonly BlobJob[]; readonly totalBytes: number; readonly observe: Observer;
  readonly pending: Segment[]; readonly active: Set<Segment>;
  connections: number;
  fetchedBytes: number; reusedBytes: number; resumedBytes: number;
}

const FRESH = { hashedTo: 0, hashing: undefined, unrecordedBytes: 0, openSegments: 0, doneBytes: 0 };

function newJob(descriptor: Descriptor, registry: Registry, offset: number, tars: readonly OpenTar[]): BlobJob {
  const { digest, size } = descriptor;
  const origins = tars.flatMap(({ handle, blobs }) => {
    const entry = blobs.get(digest);
    return entry?.sizeBytes === size ? [{ handle, offset: entry.offset }] : [];
  });
  const state = { ...FRESH, hash: newHash(digest), written: [], freshStarts: 1, isDone: false };
  return { descriptor, registry, offset, origins, ...state };
}

const newJobs = ({ entries }: Plan, tars: readonly OpenTar[], isOwnFile = false): BlobJob[] => entries.flatMap(
  ({ blob, offset }) => (blob ? [newJob(blob.descriptor, blob.registry, isOwnFile ? 0 : offset, tars)] : []));

const startAfresh = (job: BlobJob): BlobJob =>
  Object.assign(job, FRESH, { hash: newHash(job.descriptor.digest), written: [] });

const isRight = ({ hash, descriptor }: BlobJob): boolean => hash.digest("hex") === hexOf(descriptor.digest);

function newTransfer({ settings }: Session, jobs: readonly BlobJob[], observe: Observer): Transfer {
  const totalBytes = sumOf(jobs, ({ descriptor }) => descriptor.size);
  const counters = { connections: settings.concurrency, fetchedBytes: 0, reusedBytes: 0, resumedBytes: 0 };
  return { jobs, totalBytes, observe, pending: [], active: new Set(), ...counters };
}

function newSegment(job: BlobJob, at: number, to: number, isTakeover = false): Segment {
  job.openSegments += 1;
  return { job, at, to, isTakeover, startedAtMs: 0, firstByteMs: 0, receivedBytes: 0 };
}

const remaining = ({ at, to }: Segment): number => to - at;

function cutInHalf(segment: Segment): Segment {
  const middle = segment.at + Math.ceil(remaining(segment) / 2);
  const rest = newSegment(segment.job, middle, segment.to, true);
  segment.to = middle;
  return rest;
}
/** The longest range that may be cut: large enough, from a registry that answers ranges. */
function longestRange(segments: Iterable<Segment>): Segment | undefined {
  const canCut = ({ job: { origins, registry }, at, to }: Segment) => origins.length === 0 && registry.acceptsRanges
    && to - at >= 2 * (registry.latencyMs < LIMITS.farLatencyMs ? LIMITS.nearSplitBytes : LIMITS.splitBytes);
  return [...segments].filter(canCut).sort((left, right) => remaining(right) - remaining(left))[0];
}
/** Whether half of what a connection has left takes longer than a new request costs, on a line that is not full. */
function isWorthTaking(victim: Segment, active: Iterable<Segment>): boolean {
  const now = performance.now();
  const rateOf = ({ receivedBytes, startedAtMs }: Segment) => receivedBytes / Math.max(1, now - startedAtMs);
  const age = now - victim.startedAtMs;
  if (age < 50 || sumOf(active, rateOf) * 1000 > LIMITS.fastLineBytesPerSecond) return false;
  return remaining(victim) / Math.max(rateOf(victim), 1) > Math.max(50, 4 * (victim.firstByteMs || age));
}

function enqueue({ pending }: Transfer, sink: Sink, job: BlobJob): void {
  const unit = sink.unitBytes(job);
  for (const [from, to] of missingRanges(job.written, job.descriptor.size)) {
    for (let at = from; at < to; at += unit) pending.push(newSegment(job, at, Math.min(to, at + unit)));
  }
  if (job.openSegments === 0) pending.push(newSegment(job, 0, 0)); // an empty blob
}
/** Runs all jobs over at most `concurrency` connections to their end, or to the first error with all of them closed. */
async function fetchBlobs(outer: Session, transfer: Transfer, sink: Sink): Promise<void> {
  const stop = new AbortController();
  const session = { ...outer, signal: AbortSignal.any([outer.signal, stop.signal]) };
  const { active, jobs, pending, observe } = transfer;
  let idle: (() => void)[] = [];

  for (const job of jobs) if (!job.isDone) enqueue(transfer, sink, job);
  if (sink.isSplitting) {
    // A far line is worth several connections before its speed is known: closed ranges from the start waste nothing.
    const isFar = ({ job }: Segment) => job.registry.latencyMs >= LIMITS.farLatencyMs;
    for (let next; pending.length < transfer.connections && (next = longestRange(pending.filter(isFar))); ) {
      pending.push(cutInHalf(next));
    }
    pending.sort((left, right) => remaining(right) - remaining(left));
  }
  const take = (): Segment | undefined => {
    const victim = pending.length > 0 || !sink.isSplitting ? undefined : longestRange(active);
    return pending.shift() ?? (victim && isWorthTaking(victim, active) ? cutInHalf(victim) : undefined);
  };
  const lane = async () => {
    while (!session.signal.aborted && active.size < transfer.connections && pending.length + active.size > 0) {
      const segment = take();
      if (!segment) {
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, 20); // by then the rates say more
          idle.push(() => (clearTimeout(timer), resolve()));
        });
        continue;
      }
      const { job } = segment;
      active.add(segment);
      await fetchSegment(session, transfer, sink, segment);
      sink.segmentDone(job);
      job.openSegments -= 1;
      if (job.openSegments === 0) {
        job.isDone = await sink.blobDone(job);
        if (job.isDone) observe(transfer, job);
        else enqueue(transfer, sink, startAfresh(job));
      }
      active.delete(segment);
      for (const wake of idle) wake();
      idle = [];
    }
  };
  const stopAll = (error: unknown) => {
    stop.abort();
    throw error;
  };
  const results = await Promise.allSettled(Array.from({ length: transfer.connections }, () => lane().catch(stopAll)));
  if (outer.signal.aborted) fail("ABORTED", "stopped");
  settled(results);
}
/** Fetches a range to its end, however many answers that takes. */
function fetchSegment(session: Session, transfer: Transfer, sink: Sink, segment: Segment): Promise<void> {
  let before = segment.at;
  // Getting on means more than a trickle: otherwise a server that sends a byte a time would be asked for ever.
  const gotOn = () => {
    const isEnough = segment.at - before >= Math.min(LIMITS.batchBytes, Math.ceil(segment.job.descriptor.size / 64));
    before = segment.at;
    return isEnough;
  };
  return withRetries(session, async () => {
    while (segment.at < segment.to) {
      await receive(session, transfer, sink, segment).catch((error: unknown) => {
        // A registry that takes no more connections gets fewer: the range goes back to where it was taken from.
        const isCrowded = error instanceof ImgpullError && error.code === "RATE_LIMITED" && segment.isTakeover;
        if (!isCrowded || !giveBack(transfer, segment)) throw error;
        transfer.connections = Math.max(1, transfer.active.size - 1);
      });
    }
  }, gotOn);
}
/** Leaves a range to the connection that fetches what lies before it. */
function giveBack({ active }: Transfer, segment: Segment): boolean {
  const owner = [...active].find(({ job, at, to }) => job === segment.job && to === segment.at && at < to);
  if (!owner) return false;
  owner.to = segment.to;
  segment.to = segment.at;
  return true;
}
/** The server sends the whole from the start: what nobody has begun is taken along. */
function takeFollowers({ pending }: Transfer, segment: Segment): void {
  const follows = ({ job, at }: Segment) => job === segment.job && at === segment.to;
  for (let next = pending.findIndex(follows); next >= 0; next = pending.findIndex(follows)) {
    segment.to = (pending.splice(next, 1) as [Segment])[0].to;
    segment.job.openSegments -= 1;
  }
}
/** Bytes of a blob from `position` on, which ought to end at `end`. */
interface Opened { readonly stream: Readable; readonly doing: string; readonly position: number; readonly end: number }
/** Asks for what a segment still lacks; undefined where another connection brings it. */
async function openSegment(session: Session, transfer: Transfer, segment: Segment): Promise<Opened | undefined> {
  const { job: { descriptor: { size }, descriptor, registry, origins: [origin] }, at, to } = segment;
  if (origin) {
    const range = { start: origin.offset + at, end: origin.offset + to - 1, autoClose: false, highWaterMark: MIB };
    return { stream: origin.handle.createReadStream(range), doing: "reading a tar at hand", position: at, end: to };
  }
  const { body, headers, status, url } = await registry.blob(descriptor, at, to, session.signal);
  if (!body) return undefined;
  const doing = `GET ${redactUrl(url)}`;
  const refuse = (code: ErrorCode, words: string): never => {
    body.destroy();
    return fail(code, `${doing}: ${words}`, { status });
  };
  let [position, end] = [0, size];
  if (status === 206) {
    const contentRange = headers["content-range"] ?? "none";
    const [, first, last, total] = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(contentRange) ?? [];
    [position, end] = [Number(first), Number(last) + 1];
    const isOurs = position === at && end > at && end <= size && (total === "*" || Number(total) === size);
    if (!isOurs) refuse("PROTOCOL", `asked for bytes ${at}-${to - 1} of ${size}, got "${printable(contentRange, 80)}"`);
  } else if (at > 0 || to < size) {
    registry.acceptsRanges = false;
    if (giveBack(transfer, segment)) return void body.destroy();
    takeFollowers(transfer, segment);
  }
  const stream = decodeBody(body, end - position);
  const length = Number(headers["content-length"] ?? end - position);
  const isLie = stream === body && length !== end - position;
  if (isLie) refuse("SIZE_MISMATCH", `${length} bytes are announced where ${end - position} belong`);
  return { stream, doing, position, end };
}
/** One request for what a segment still lacks, and its bytes into the sink. */
async function receive(session: Session, transfer: Transfer, sink: Sink, segment: Segment): Promise<void> {
  const { job } = segment;
  Object.assign(segment, { startedAtMs: performance.now(), firstByteMs: 0, receivedBytes: 0 });
  const opened = await openSegment(session, transfer, segment);
  if (!opened) return;
  const { stream, doing, end } = opened;
  const counter = job.origins.length > 0 ? "reusedBytes" : "fetchedBytes";
  segment.firstByteMs = performance.now() - segment.startedAtMs;
  let { position } = opened;
  let [gathered, gatheredBytes]: [Buffer[], number] = [[], 0];
  let writing = Promise.resolve();
  /** One batch is on its way to disk while the next one is gathered. */
  const flush = async () => {
    const [chunks, from, previous] = [gathered, segment.at - gatheredBytes, writing];
    [gathered, gatheredBytes] = [[], 0];
    writing = previous.then(() => sink.write(job, from, chunks));
    writing.catch(() => undefined); // it is awaited below
    await previous;
    transfer.observe(transfer);
  };
  const take = (wanted: Buffer) => {
    sink.accept(job, segment.at, wanted);
    gathered.push(wanted);
    gatheredBytes += wanted.length;
    segment.at += wanted.length;
    segment.receivedBytes += wanted.length;
    job.doneBytes += wanted.length;
    transfer[counter] += wanted.length;
  };
  const writer = new Writable({
    write: (chunk: Buffer, _encoding, callback) => {
      const skipped = Math.min(chunk.length, Math.max(0, segment.at - position));
      const wanted = chunk.subarray(skipped, skipped + remaining(segment));
      position += chunk.length;
      if (wanted.length > 0) take(wanted);
      // More than belongs there, or another connection has taken the rest over: no need to hear it to its end.
      if (position > end || (segment.at >= segment.to && position < end)) stream.destroy();
      if (gatheredBytes < LIMITS.batchBytes) callback();
      else flush().then(() => callback(), callback);
    },
  });
  const failure = await pipeline(stream, writer, { signal: session.signal }).then(() => undefined, (error: unknown) => error);
  if (gatheredBytes > 0) await flush();
  await writing;
  if (position > end) fail("SIZE_MISMATCH", `${doing}: more than the ${end} bytes that belong there`);
  if (segment.at >= segment.to) return;
  if (session.signal.aborted) fail("ABORTED", "stopped");
  if (failure instanceof ImgpullError) throw failure;
  if (position < end) fail("NETWORK", `${doing}: the connection ended after ${position} of ${end} bytes`, { cause: failure });
}
/** Hashes what lies at a place. */
async function hashPlace(handle: fs.FileHandle, from: number, to: number, hash: Hash): Promise<Hash> {
  const buffer = Buffer.allocUnsafe(Math.min(LIMITS.batchBytes, to - from));
  for (let at = from; at < to; ) {
    const piece = await readAt(handle, at, Math.min(buffer.length, to - at), buffer);
    if (piece.length === 0) fail("DISK", "a file became shorter while it was read");
    hash.update(piece);
    at += piece.length;
  }
  return hash;
}

const isIntact = async ({ handle, offset }: Origin, { digest, size }: Descriptor): Promise<boolean> =>
  (await hashPlace(handle, offset, offset + size, newHash(digest))).digest("hex") === hexOf(digest);

async function writeAll(handle: fs.FileHandle, chunks: Buffer[], position: number): Promise<void> {
  const { bytesWritten } = await handle.writev(chunks, position);
  if (bytesWritten === sumOf(chunks, ({ length }) => length)) return;
  await writeAll(handle, [Buffer.concat(chunks).subarray(bytesWritten)], position + bytesWritten);
}
/** What the partial holds, a line at a time, true after a kill -9: the plan's id, then `digest from-to,…;`. */
type Journal = Readonly<{
  held: ReadonlyMap<string, Range[]>; record: (job: BlobJob) => void; close: () => Promise<void>;
}>;

async function openJournal(file: string, planId: string): Promise<Journal> {
  const [id, ...lines] = ((await readOptional(file)) ?? "").split("\n");
  const held = new Map<string, Range[]>();
  for (const line of id === planId ? lines : []) {
    const [, digest = "", text = ""] = /^(\S+) ([\d,-]*);$/.exec(line) ?? [];
    const ranges = text.split(",").map((range) => range.split("-").map(Number) as Range);
    held.set(digest, ranges.filter(([from, to]) => from < to).reduce<Range[]>(addRange, []));
  }
  const handle = await fs.open(file, id === planId ? "a" : "w");
  let writing: Promise<unknown> = id === planId ? Promise.resolve() : handle.appendFile(`${planId}\n`);
  const record = (job: BlobJob) => {
    job.unrecordedBytes = 0;
    const line = `${job.descriptor.digest} ${job.written.map((range) => range.join("-")).join(",")};\n`;
    writing = writing.then(() => handle.appendFile(line)).catch(() => undefined); // losing a line costs bytes only
  };
  return { held, record, close: () => writing.catch(() => undefined).then(() => handle.close()) };
}

const isRunning = (pid: number): boolean => {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return errorCodeOf(error) === "EPERM";
  }
};
/**
 * Two runs at one DEST would write over each other: the second stops. A lock says who has it, and is touched while
 * held; one that was left alone, or whose process is gone from this machine, is taken over.
 */
async function acquireLock(file: string, dest: string): Promise<() => Promise<void>> {
  const [host, since] = [os.hostname(), performance.timeOrigin];
  const mine = JSON.stringify({ pid: process.pid, host, since, id: Math.random() });
  const busy = (who: string) => fail("DISK", `${dest} is being pulled by another imgpull${who}`);
  await fs.writeFile(file, mine, { flag: "wx" }).catch(async (error: unknown) => {
    if (errorCodeOf(error) !== "EEXIST") throw error;
    const owner = (parseJson((await readOptional(file)) ?? "") ?? {}) as Record<string, unknown>;
    const { mtimeMs } = await fs.stat(file).catch(() => ({ mtimeMs: 0 }));
    const isThere = owner.pid === process.pid ? owner.since === since : isRunning(Number(owner.pid));
    const isHeld = Date.now() - mtimeMs < 6 * LIMITS.lockBeatMs && (owner.host !== host || isThere);
    if (owner.pid && isHeld) busy(` (process ${owner.pid} on ${owner.host})`);
    await fs.writeFile(`${file}.${process.pid}`, mine);
    await fs.rename(`${file}.${process.pid}`, file);
    await delay(20); // another that saw the same stale lock has put its own here by now: the last one has it
    if ((await readOptional(file)) !== mine) busy("");
  });
  const beat = () => void fs.utimes(file, new Date(), new Date()).catch(() => undefined);
  const timer = setInterval(beat, LIMITS.lockBeatMs).unref();
  return () => (clearInterval(timer), fs.rm(file, { force: true }));
}
/** Where each blob's bytes are put: all in one tar, or each in a file of its own. */
type Places = Readonly<{ open: (job: BlobJob) => Promise<fs.FileHandle>; finish: (job: BlobJob) => Promise<void> }>;
/** Bytes into files: hashed as they come where they come in order, from disk where they do not. */
function fileSink({ warn }: Session, places: Places, journal: Journal): Sink {
  /** Hashes what is written beyond what is hashed: bytes that an earlier run or another connection put there. */
  const catchUp = (job: BlobJob): Promise<void> => (job.hashing ??= (async () => {
    for (;;) {
      const to = job.written.find(([from, end]) => from <= job.hashedTo && end > job.hashedTo)?.[1];
      if (to === undefined) return;
      await hashPlace(await places.open(job), job.offset + job.hashedTo, job.offset + to, job.hash);
      job.hashedTo = to;
    }
  })().finally(() => (job.hashing = undefined)));
  return {
    isSplitting: true,
    unitBytes: () => NEVER,
    accept: (job, position, chunk) => {
      if (job.hashing || position !== job.hashedTo) return;
      job.hash.update(chunk);
      job.hashedTo += chunk.length;
    },
    write: async (job, position, chunks) => {
      const end = position + sumOf(chunks, ({ length }) => length);
      await writeAll(await places.open(job), chunks, job.offset + position);
      job.written = addRange(job.written, [position, end]);
      job.unrecordedBytes += end - position;
      if (job.unrecordedBytes >= LIMITS.journalBytes) journal.record(job);
      if (position <= job.hashedTo && job.hashedTo < end) catchUp(job).catch(() => undefined); // blobDone meets it too
    },
    segmentDone: (job) => journal.record(job),
    blobDone: async (job) => {
      while (job.hashedTo < job.descriptor.size) await catchUp(job);
      if (isRight(job)) {
        await places.finish(job);
        journal.record(job);
        return true;
      }
      if (job.origins.shift()) return false; // a tar at hand that lied: the next one, or the registry
      const wrong = `${job.descriptor.digest}: the bytes have another digest`;
      job.freshStarts -= 1;
      if (job.freshStarts < 0) {
        journal.record(startAfresh(job)); // nothing of it is worth keeping
        fail("DIGEST_MISMATCH", `${wrong}, twice, from ${job.registry.origin}`);
      }
      warn(`${wrong}; fetching the blob once more`);
      return false;
    },
  };
}
/** Brings every job's bytes to its place: what the journal says is there stays, the rest comes. */
async function fillPlaces(
  session: Session, transfer: Transfer, base: string, planId: string, places: Places,
): Promise<Transfer> {
  const { jobs, observe } = transfer;
  const journal = await openJournal(`${base}.journal`, planId);
  const sink = fileSink(session, places, journal);
  try {
    for (const job of jobs) {
      const { descriptor: { digest, size } } = job;
      const ranges = journal.held.get(digest) ?? [];
      const placeEnd = ranges.length === 0 ? 0 : (await (await places.open(job)).stat()).size - job.offset;
      job.written = ranges.filter(([, to]) => to <= size && to <= placeEnd); // a place that has gone holds nothing
      job.doneBytes = lengthOf(job.written);
      transfer.resumedBytes += job.doneBytes;
      if (job.doneBytes === 0) continue;
      job.origins.length = 0;
      job.freshStarts += 1; // if the disk lost what the journal says, that is not the registry's fault
      if (job.doneBytes < size) continue;
      job.isDone = await sink.blobDone(job);
      if (job.isDone) observe(transfer, job);
      else startAfresh(job);
    }
    await fetchBlobs(session, transfer, sink);
    return transfer;
  } finally {
    await Promise.all(jobs.map((job) => job.hashing?.catch(() => undefined)));
    for (const job of jobs) if (job.unrecordedBytes > 0) journal.record(job);
    await journal.close();
  }
}
/** Sync where the file system and Node's permission model let us; what they refuse is no reason to fail. */
async function syncQuietly(handle: fs.FileHandle): Promise<void> {
  await handle.sync().catch((error: unknown) => {
    if (!["ERR_ACCESS_DENIED", "EINVAL", "ENOSYS", "ENOTSUP", "EPERM"].includes(errorCodeOf(error))) throw error;
  });
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await fs.open(folder, "r").catch(() => undefined); // Windows has no handle for a folder
  if (handle) await syncQuietly(handle).finally(() => handle.close());
}

async function checkFreeSpace(dest: string, folder: string, neededBytes: number): Promise<void> {
  const { bavail, bsize } = await fs.statfs(folder).catch(() => ({ bavail: NEVER, bsize: 1 }));
  const [needed, free] = [formatBytes(neededBytes), formatBytes(bavail * bsize)];
  const words = `cannot write ${dest}: the disk is full, ${needed} are needed and ${folder} has ${free} free`;
  if (neededBytes > bavail * bsize) fail("DISK", words);
}

const openForUpdate = (file: string): Promise<fs.FileHandle> =>
  fs.open(file, fs.constants.O_RDWR | fs.constants.O_CREAT, 0o666);
/** The plan into `dest` by way of `dest`.partial. */
async function pullToTar(session: Session, plan: Plan, dest: string, reuse: readonly OpenTar[], observe: Observer) {
  const partial = `${dest}.partial`;
  const unlock = await acquireLock(`${partial}.lock`, dest);
  const opened: fs.FileHandle[] = [];
  let isWorthKeeping = true;
  try {
    const isOurs = (await readOptional(`${partial}.journal`))?.split("\n")[0] === plan.id
      && (await fs.stat(partial).catch(() => undefined))?.size === plan.sizeBytes;
    isWorthKeeping = isOurs;
    // A partial of another plan (the tag has moved on) is not at our offsets, but its blobs can be copied.
    if (!isOurs) await fs.rename(partial, `${partial}.old`).catch(() => undefined);
    if (!isOurs) await fs.rm(`${partial}.journal`, { force: true });
    const found = await Promise.all([`${partial}.old`, dest].map((file) => openTar(file).catch(() => undefined)));
    const atHand = found.filter((tar) => tar !== undefined);
    const handle = await openForUpdate(partial);
    opened.push(handle, ...atHand.map((tar) => tar.handle));
    await checkFreeSpace(dest, path.dirname(dest), plan.sizeBytes - (await handle.stat()).blocks * BLOCK);
    for (const { lead, bytes, offset } of plan.entries) {
      await writeAll(handle, [lead, bytes ?? Buffer.alloc(0)], offset - lead.length);
    }
    await writeAll(handle, [plan.trailer], plan.sizeBytes - plan.trailer.length);
    await handle.truncate(plan.sizeBytes);
    const transfer = newTransfer(session, newJobs(plan, [...reuse, ...atHand]), observe);
    try {
      await fillPlaces(session, transfer, partial, plan.id, { open: async () => handle, finish: async () => undefined });
      await syncQuietly(handle);
      await fs.rename(partial, dest);
      isWorthKeeping = false;
      await syncFolder(path.dirname(dest));
      return transfer;
    } catch (error) {
      const keptBytes = sumOf(transfer.jobs, ({ written }) => lengthOf(written));
      isWorthKeeping = keptBytes > 0;
      if (isWorthKeeping) session.warn(`${partial} keeps ${formatBytes(keptBytes)}: the same command goes on from there`);
      throw error;
    }
  } finally {
    for (const handle of opened) await handle.close();
    const leftovers = isWorthKeeping ? [] : [partial, `${partial}.journal`, `${partial}.old`];
    for (const file of leftovers) await fs.rm(file, { force: true });
    await unlock();
  }
}

async function replaceFile(file: string, bytes: Uint8Array): Promise<void> {
  await fs.writeFile(`${file}.partial`, bytes, { flush: true } as object);
  await fs.rename(`${file}.partial`, file);
}

type Naming = (digest: string) => string;
/** Each blob as a file of its own under `folder`; those that are there already are verified and kept. */
async function pullToFolder(session: Session, jobs: readonly BlobJob[], folder: string, nameOf: Naming, observe: Observer) {
  const base = path.join(folder, ".imgpull.partial");
  const unlock = await acquireLock(`${base}.lock`, folder);
  const handles = new Map<BlobJob, Promise<fs.FileHandle>>();
  const fileOf = ({ descriptor }: BlobJob) => path.join(folder, nameOf(descriptor.digest));
  const open = (job: BlobJob) => {
    const handle = handles.get(job) ?? openForUpdate(`${fileOf(job)}.partial`);
    handles.set(job, handle);
    return handle;
  };
  const finish = async (job: BlobJob) => {
    const handle = await open(job);
    await handle.truncate(job.descriptor.size);
    await syncQuietly(handle);
    handles.delete(job);
    await handle.close();
    await fs.rename(`${fileOf(job)}.partial`, fileOf(job));
  };
  const isMissing = async (job: BlobJob) => {
    const handle = await fs.open(fileOf(job), "r").catch(() => undefined);
    const hasSize = (await handle?.stat())?.size === job.descriptor.size;
    const isThere = handle && hasSize && (await isIntact({ handle, offset: 0 }, job.descriptor));
    await handle?.close();
    return isThere !== true;
  };
  try {
    const missing: BlobJob[] = [];
    for (const job of jobs) if (await isMissing(job)) missing.push(job);
    const transfer = newTransfer(session, missing, observe);
    await checkFreeSpace(folder, folder, transfer.totalBytes);
    await fillPlaces(session, transfer, base, "folder", { open, finish });
    transfer.reusedBytes += sumOf(jobs, ({ descriptor }) => descriptor.size) - transfer.totalBytes;
    await fs.rm(`${base}.journal`, { force: true });
    return transfer;
  } finally {
    for (const handle of handles.values()) await (await handle).close();
    await unlock();
  }
}
/** An OCI image layout: blobs first, then the index that names them, in one step and beside what it named before. */
async function pullToLayout(session: Session, plan: Plan, folder: string, tars: readonly OpenTar[], observe: Observer) {
  const files = new Map(plan.entries.map(({ name, bytes }) => [name, bytes]));
  for (const name of files.keys()) await fs.mkdir(path.dirname(path.join(folder, name)), { recursive: true });
  const old = parseJson((await readOptional(path.join(folder, "index.json"))) ?? "{}");
  if (!isRecord(old)) return fail("DISK", `${folder} holds an index.json that is not a JSON object`);
  const transfer = await pullToFolder(session, newJobs(plan, tars, true), folder, blobPath, observe);
  const ours = parseJson(files.get("index.json") ?? "") as { manifests: Descriptor[] };
  const nameOf = ({ annotations }: Descriptor) => annotations?.["org.opencontainers.image.ref.name"];
  const isOurs = (entry: Descriptor) => ours.manifests.some((other) => nameOf(other) === nameOf(entry));
  const others = (Array.isArray(old.manifests) ? (old.manifests as Descriptor[]) : []).filter((entry) => !isOurs(entry));
  for (const name of ["manifest.json", "index.json"]) files.delete(name);
  files.set("index.json", encodeJson({ ...old, ...ours, manifests: [...others, ...ours.manifests] })); // last of all
  for (const [name, bytes] of files) if (bytes) await replaceFile(path.join(folder, name), bytes);
  await syncFolder(folder);
  return transfer;
}
/** The plan in order onto a stream. What comes early waits in a window; the trailer is written only if all was right. */
async function pullToStream(
  outer: Session, plan: Plan, output: NodeJS.WritableStream, tars: readonly OpenTar[], observe: Observer,
): Promise<Transfer> {
  const stop = new AbortController();
  const session = { ...outer, signal: AbortSignal.any([outer.signal, stop.signal]) };
  const transfer = newTransfer(session, newJobs(plan, tars), observe);
  const early = new Map<number, Buffer[]>(); // by offset in the tar
  const waiting: (() => void)[] = [];
  const wake = () => waiting.splice(0).forEach((resume) => resume());
  const until = async (isReady: () => boolean) => {
    while (!isReady()) {
      if (session.signal.aborted) fail("ABORTED", "stopped");
      await new Promise<void>((resolve) => waiting.push(resolve));
    }
  };
  let cursor = 0;
  async function* inOrder() {
    for (const { lead, bytes, offset, sizeBytes } of [...plan.entries, { lead: plan.trailer, offset: plan.sizeBytes, sizeBytes: 0 }]) {
      yield lead;
      if (bytes) yield bytes;
      const job = bytes ? undefined : transfer.jobs.find((each) => each.offset === offset);
      for (cursor = bytes ? offset + sizeBytes : offset; cursor < offset + sizeBytes; ) {
        await until(() => early.has(cursor));
        const chunks = early.get(cursor) ?? [];
        early.delete(cursor);
        for (const chunk of chunks) {
          job?.hash.update(chunk);
          yield chunk;
          cursor += chunk.length;
          wake();
        }
      }
      if (job && !isRight(job)) fail("DIGEST_MISMATCH", `${job.descriptor.digest}: the bytes have another digest`);
    }
  }
  const sink: Sink = {
    isSplitting: false,
    unitBytes: ({ registry: { acceptsRanges, latencyMs }, origins }) =>
      (acceptsRanges && latencyMs >= LIMITS.farLatencyMs && origins.length === 0 ? LIMITS.streamUnitBytes : NEVER),
    accept: () => undefined,
    write: async ({ offset }, position, chunks) => {
      await until(() => offset + position < cursor + LIMITS.streamWindowBytes);
      early.set(offset + position, chunks);
      wake();
    },
    segmentDone: () => undefined,
    blobDone: async () => true,
  };
  session.signal.addEventListener("abort", wake);
  // What is sent cannot be taken back: a tar at hand is hashed before a byte of it is used.
  for (const { origins, descriptor } of transfer.jobs) {
    while (origins[0] && !(await isIntact(origins[0], descriptor))) origins.shift();
  }
  const source = Readable.from(inOrder(), { objectMode: true, highWaterMark: 1 });
  const stopAll = (error: unknown) => stop.abort(error);
  const emitting = pipeline(source, output, { end: false }).catch(stopAll);
  await fetchBlobs(session, transfer, sink).catch(stopAll);
  if (stop.signal.aborted) source.destroy();
  await emitting;
  if (outer.signal.aborted) fail("ABORTED", "stopped");
  if (stop.signal.aborted) throw stop.signal.reason;
  return transfer;
}

// ====== 13. Puller ======
// References → resolved images → plan → DEST. Everything is resolved, and every failure named, before a layer moves.

/** Reads a config before its turn, where the platform stands nowhere else. */
function fetchConfig(session: Session, registry: Registry, descriptor: Descriptor): Promise<Buffer> {
  const { digest, size } = descriptor;
  return withRetries(session, async () => {
    const { body, url } = await registry.blob(descriptor, 0, size, session.signal);
    const bytes = await readBody(body as http.IncomingMessage, LIMITS.configBytes, `the config ${digest}`);
    if (digestOf(bytes, digest) === digest && bytes.length === size) return bytes;
    return fail("DIGEST_MISMATCH", `${redactUrl(url)}: the config's bytes have another digest`);
  });
}
/** The manifests for one reference: the platform's, or all of them. */
async function resolveImage(session: Session, reference: Reference, name: string, isAll: boolean): Promise<ResolvedImage> {
  const image = await resolveAs(session, reference, isAll);
  // What has no tag is named by the digest that DEST holds, so that the printed line gives the same name again.
  return { ...image, name: name.replace(/@.*$/, `@${image.top.digest}`) };
}

async function resolveAs(session: Session, reference: Reference, isAll: boolean): Promise<Omit<ResolvedImage, "name">> {
  const where = formatReference(reference);
  const registry = registryOf(session, reference);
  const { wanted, concurrency } = session.settings;
  const top = await registry.manifest(reference.digest ?? (reference.tag as string));
  const parsed = parseManifest(top, where);
  const common = { reference, registry };
  const fetchChild = async ({ digest, size }: Descriptor) => {
    const child = await registry.manifest(digest);
    const wrong = `${where}: ${digest} has ${child.bytes.length} bytes, not ${size}`;
    return child.bytes.length === size ? child : fail("SIZE_MISMATCH", wrong);
  };
  const checkDepth = (depth: number) => depth <= LIMITS.indexDepth
    || fail("TOO_LARGE", `${where}: indexes inside indexes, more than ${LIMITS.indexDepth} deep`);
  const isNested = ({ mediaType }: Descriptor) => INDEX_TYPES.includes(mediaType);
  const isAttestation = ({ platform }: { platform?: Platform }) => platform?.os === "unknown" || platform?.architecture === "unknown";

  if (isAll) {
    const manifests = new Map([[top.digest, top]]);
    const contents: ImageContent[] = [];
    const collect = async (manifest: ImageManifest | IndexManifest, platform: Platform | undefined, depth: number): Promise<void> => {
      checkDepth(depth);
      if (manifest.kind === "image") return void contents.push({ manifest, ...given({ platform }) });
      const entries = manifest.manifests.filter(({ digest }) => !manifests.has(digest));
      const children = await mapConcurrently(entries, concurrency, fetchChild);
      for (const [at, child] of children.entries()) {
        if (manifests.has(child.digest)) continue;
        manifests.set(child.digest, child);
        await collect(parseManifest(child, where), entries[at]?.platform, depth + 1);
      }
    };
    await collect(parsed, undefined, 0);
    const ordered = [...contents.filter((content) => !isAttestation(content)), ...contents.filter(isAttestation)];
    return { ...common, top, manifests: [...manifests.values()], contents: ordered, platform: "all" };
  }
  if (parsed.kind === "image") {
    const isConfig = CONFIG_TYPES.includes(parsed.config.mediaType);
    const configBytes = isConfig ? await fetchConfig(session, registry, parsed.config) : undefined;
    const config = configBytes && parseJson(configBytes);
    const platform = isRecord(config) && config.os ? parsePlatform(config) : undefined;
    if (platform) checkPlatform(session, where, platform);
    const contents = [{ manifest: parsed, ...given({ platform, configBytes }) }];
    return { ...common, top, manifests: [top], contents, platform: formatPlatform(platform) };
  }
  const seen = new Set<string>();
  const search = async (index: IndexManifest, platform: Platform, depth: number): Promise<[Descriptor, FetchedManifest] | undefined> => {
    checkDepth(depth);
    const usable = index.manifests.filter((entry) => !isAttestation(entry));
    const plain = usable.filter((entry) => !isNested(entry));
    for (const entry of plain) if (entry.platform) seen.add(formatPlatform(entry.platform));
    const only = usable.length === 1 && !plain[0]?.platform ? plain[0] : undefined;
    const found = matchPlatform(plain, platform) ?? only;
    if (found) return [found, await fetchChild(found)];
    for (const entry of usable.filter(isNested)) {
      if (entry.platform?.os && !matchPlatform([entry], platform)) continue;
      const nested = parseManifest(await fetchChild(entry), where);
      const inside = nested.kind === "index" ? await search(nested, platform, depth + 1) : undefined;
      if (inside) return inside;
    }
    return undefined;
  };
  const host = wantedPlatform(wanted);
  let found = await search(parsed, host, 1);
  if (!found && wanted.os === undefined && host.os !== "linux") {
    found = await search(parsed, { ...host, os: "linux" }, 1);
    if (found) session.warn(`${where} has nothing for ${host.os}: taking linux`);
  }
  const choices = printable([...seen].join(", ") || "none", 1000);
  const [entry, fetched] = found
    ?? fail("NO_PLATFORM", `${where} has no image for ${formatPlatform(host)}\n  it has: ${choices} (--platform)`);
  const manifest = parseManifest(fetched, where);
  if (manifest.kind !== "image") return fail("PROTOCOL", `${where}: the entry for ${formatPlatform(host)} is an index`);
  const contents = [{ manifest, ...given({ platform: entry.platform }) }];
  return { ...common, top: fetched, manifests: [fetched], contents, platform: formatPlatform(entry.platform) };
}
/** A single image for another platform than the one asked for is an error; than this machine's, a warning. */
function checkPlatform({ settings: { wanted }, warn }: Session, where: string, platform: Platform): void {
  const asked = { ...platform, ...wanted };
  const isSame = ({ os: system, architecture }: Platform) => system === platform.os && architecture === platform.architecture;
  const isAsked = wanted.variant === undefined ? isSame(asked)
    : matchPlatform([{ mediaType: "", digest: "", size: 0, platform }], asked) !== undefined;
  const what = `it is one image, for ${formatPlatform(platform)}`;
  if (!isAsked) fail("NO_PLATFORM", `${where} has no image for ${formatPlatform(asked)}\n  ${what}`);
  const host = wantedPlatform(wanted);
  if (!isSame({ ...host, os: platform.os === "linux" ? "linux" : host.os })) warn(`${where}: ${what}, not for this machine`);
}

interface PullRequest {
  readonly images: readonly { readonly reference: Reference; readonly name: string }[];
  readonly destination: string | NodeJS.WritableStream;
  readonly isAll: boolean;
  readonly reuse: readonly string[];
  readonly since?: string;
}

function warnOfLayers({ warn }: Session, images: readonly ResolvedImage[]): void {
  const kinds: [RegExp, string][] = [
    [/zstd/, "has layers compressed with zstd: Docker before 23 and podman before 4 will not load it"],
    [/foreign|nondistributable/, "has foreign layers, which Docker on Linux and some registries do not take"],
  ];
  for (const { contents, name } of images) {
    const types = contents.flatMap(({ manifest }) => manifest.layers.map(({ mediaType }) => mediaType));
    for (const [kind, words] of kinds) if (types.some((type) => kind.test(type))) warn(`${name} ${words}`);
  }
}
/** The whole job, for the library and the command alike. */
async function pullImages(session: Session, request: PullRequest, observe: Observer) {
  const { destination: given, images: wanted, isAll, since } = request;
  const isDirectory = (file: string) => fs.stat(file).then((stats) => stats.isDirectory(), () => false);
  const isLayout = typeof given === "string" && (/[\\/]$/.test(given) || (await isDirectory(given)));
  const doing = `cannot write ${typeof given === "string" ? given : "the stream"}`;
  // A device or FIFO is written to in order; it must not be replaced by a file.
  const isSpecial = !isLayout && typeof given === "string" && (await fs.stat(given).then((stats) => !stats.isFile(), () => false));
  const device = isSpecial ? await onDisk(doing, fs.open(given, "w")) : undefined;
  const destination = device?.createWriteStream() ?? given;
  if (typeof destination === "string" && !isLayout) {
    const folder = path.dirname(destination);
    if (!(await isDirectory(folder))) fail("DISK", `${doing}: there is no directory ${folder}`);
    await onDisk(doing, fs.access(folder, fs.constants.W_OK));
  }
  const sources: OpenTar[] = [];
  try {
    for (const file of request.reuse) sources.push(await openTar(file));
    const base = since === undefined ? undefined : await openTar(since);
    await base?.handle.close();
    const images = await mapConcurrently(wanted, session.settings.concurrency, ({ reference, name }) =>
      resolveImage(session, reference, name, isAll));
    const plan = planTar(images, new Set(base?.blobs.keys()));
    warnOfLayers(session, images);
    if (base) {
      const size = formatBytes(sumOf(plan.omitted, (layer) => layer.size));
      session.warn(`left out ${plan.omitted.length} layers (${size}) that ${since} holds: load that first. ` +
        "docker's containerd store and ctr --no-unpack take this tar without it, in silence");
    }
    const transfer = await onDisk(doing,
      typeof destination !== "string" ? pullToStream(session, plan, destination, sources, observe)
      : isLayout ? pullToLayout(session, plan, destination, sources, observe)
      : pullToTar(session, plan, await fs.realpath(destination).catch(() => destination), sources, observe));
    const results = images.map(({ name, top, platform, contents }): PullResult => ({
      name, digest: top.digest, platform, layers: sumOf(contents, ({ manifest }) => manifest.layers.length),
      sizeBytes: isLayout ? plan.blobBytes : plan.sizeBytes, fetchedBytes: transfer.fetchedBytes,
    }));
    return { results, transfer, plan };
  } finally {
    for (const { handle } of sources) await handle.close();
    await device?.close().catch(() => undefined);
  }
}
/** Checks a caller's options; what is wrong is named as the option it is. */
function settingsOf(opts: PullerOpts, environment: Environment, certsDirectory = "/etc/docker/certs.d"): Settings {
  const refuse = (reason: string): never => fail("BAD_OPTION", reason);
  const integer = (value: number, name: string, minimum: number) =>
    (Number.isSafeInteger(value) && value >= minimum ? value : refuse(`${name} must be a whole number from ${minimum} on`));
  const { scheme = "https", insecure = false, tlsCert, tlsKey, caCert, username, password, token, namespace } = opts;
  if (scheme !== "https" && scheme !== "http") refuse(`the scheme is https or http, not "${printable(String(scheme))}"`);
  if ((tlsCert === undefined) !== (tlsKey === undefined)) refuse("a client certificate and its key go together (--cert, --key)");
  if ((password === undefined) !== (username === undefined)) refuse("a user name and a password go together (--user, --password)");
  if (token !== undefined && username !== undefined) refuse("--token and --user exclude each other");
  if (token !== undefined && !/^[\x21-\x7e]+$/.test(token)) refuse("the token has characters that no header can carry");
  if (namespace !== undefined && !isHost(namespace)) refuse(`"${printable(namespace)}" is not a registry's host name (--ns)`);
  return {
    scheme, insecure, environment, certsDirectory,
    timeoutMs: integer(opts.timeoutMs ?? 30_000, "the timeout", 1),
    concurrency: Math.min(64, integer(opts.concurrency ?? 8, "concurrency", 1)),
    retries: integer(opts.retries ?? 5, "retries", 0),
    wanted: given({ os: opts.osType, architecture: opts.archType, variant: opts.variant }),
    ...given({ tlsCert, tlsKey, caCert, username, password, token, namespace }),
  };
}
/** Everything that one pull opens is closed when `run` ends. */
async function withSession<T>(
  opts: PullerOpts, run: (session: Session) => Promise<T>, replaced: Partial<Session & Settings> = {},
): Promise<T> {
  const { environment = process.env, certsDirectory } = replaced;
  const settings = settingsOf(opts, environment, certsDirectory);
  const transport = createTransport(settings);
  const { signal = new AbortController().signal, onWarning: warn = () => undefined } = opts;
  try {
    if (signal.aborted) fail("ABORTED", "stopped", { cause: signal.reason });
    return await run({ settings, transport, signal, clock: systemClock, challenges: new Map(), registries: new Map(), warn, ...replaced });
  } finally {
    transport.close();
  }
}
/** https, this system's platform. */
function newPullerOpts(url: string): PullerOpts {
  const { os: osType, architecture: archType } = hostPlatform();
  return { url, scheme: "https", osType, archType };
}
/** Pulls one image. Throws ImgpullError: BAD_REFERENCE and BAD_OPTION at once, the rest from its methods. */
class Puller {
  readonly #opts: PullerOpts;
  readonly #reference: Reference;

  constructor(urlOrOpts: string | PullerOpts) {
    this.#opts = typeof urlOrOpts === "string" ? { url: urlOrOpts } : { ...urlOrOpts };
    this.#reference = parseReference(this.#opts.url);
    settingsOf(this.#opts, {});
  }

  getUrl(): string {
    return this.#opts.url;
  }

  getOpts(): PullerOpts {
    return { ...this.#opts };
  }
  /** Leaves a verified tar at `dest`, or adds to the OCI image layout there where that is a directory or ends in "/". */
  pullTar(dest: string): Promise<PullResult> {
    const { namespace, onProgress } = this.#opts;
    const images = [{ reference: this.#reference, name: formatReference(imageName(this.#reference, namespace)) }];
    return withSession(this.#opts, async (session) => {
      const report = progressReporter(onProgress);
      const { results, transfer } = await pullImages(session, { images, destination: dest, isAll: false, reuse: [] }, report);
      report(transfer, undefined, "finish");
      return results[0] as PullResult;
    });
  }
  /** The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no index for it. */
  pullManifest(type: "list" | "image"): Promise<ManifestHolder> {
    return withSession(this.#opts, async (session) => {
      if (type === "image") return this.#holder((await resolveImage(session, this.#reference, "", false)).top);
      if (type !== "list") fail("BAD_OPTION", `a manifest is "list" or "image", not "${printable(String(type))}"`);
      const fetched = await this.#fetch(session);
      if (parseManifest(fetched, this.#opts.url).kind === "index") return this.#holder(fetched);
      return fail("NOT_FOUND", `${formatReference(this.#reference)} has no list of manifests: it is one image (--manifest image)`);
    });
  }
  /** Whatever the registry has under the reference: an index or an image manifest. */
  getManifest(): Promise<ManifestHolder> {
    return withSession(this.#opts, async (session) => {
      const fetched = await this.#fetch(session);
      parseManifest(fetched, this.#opts.url);
      return this.#holder(fetched);
    });
  }
  /** The manifest's descriptor by a HEAD request; by its bytes where the registry leaves something out. */
  headManifest(): Promise<{ mediaType: string; digest: string; size: number }> {
    return withSession(this.#opts, async (session) => {
      const { digest: wanted, tag } = this.#reference;
      const head = await new Registry(session, this.#reference).head(wanted ?? (tag as string));
      if (head && (wanted ?? head.digest) === head.digest) return head;
      const { mediaType, digest, bytes } = await this.#fetch(session);
      return { mediaType, digest, size: bytes.length };
    });
  }
  /** Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept. */
  async pullBlobs(holder: ManifestHolder, dir: string): Promise<void> {
    const manifest = parseManifest({ ...holder, bytes: Buffer.from(holder.bytes) }, holder.imageUrl);
    if (manifest.kind !== "image") return fail("NOT_AN_IMAGE", `${holder.imageUrl}: a list of manifests has no blobs of its own`);
    const blobs = new Map([manifest.config, ...manifest.layers].map((descriptor) => [descriptor.digest, descriptor]));
    await withSession(this.#opts, async (session) => {
      const registry = new Registry(session, this.#reference);
      const jobs = [...blobs.values()].map((descriptor) => newJob(descriptor, registry, 0, []));
      const report = progressReporter(this.#opts.onProgress);
      await onDisk(`cannot write ${dir}`, fs.mkdir(dir, { recursive: true }));
      const transfer = await onDisk(`cannot write ${dir}`, pullToFolder(session, jobs, dir, hexOf, report));
      report(transfer, undefined, "finish");
    });
  }

  #fetch(session: Session): Promise<FetchedManifest> {
    const { digest, tag } = this.#reference;
    return new Registry(session, this.#reference).manifest(digest ?? (tag as string));
  }

  #holder({ mediaType, digest, bytes }: FetchedManifest): ManifestHolder {
    return { mediaType, digest, bytes, manifest: parseJson(bytes), imageUrl: this.#opts.url };
  }
}
/** Turns what happens into Progress; bytes that are fetched again do not make it fall. */
function progressReporter(onProgress: PullerOpts["onProgress"]) {
  let highest = 0;
  onProgress?.({ phase: "resolve", doneBytes: 0, totalBytes: 0, blobsDone: 0, blobsTotal: 0 });
  return ({ jobs, totalBytes }: Transfer, _finished?: BlobJob, phase: Progress["phase"] = "fetch"): void => {
    highest = Math.max(highest, Math.min(totalBytes, sumOf(jobs, (job) => job.doneBytes)));
    const doneBytes = phase === "finish" ? totalBytes : highest;
    onProgress?.({ phase, doneBytes, totalBytes, blobsDone: jobs.filter((job) => job.isDone).length, blobsTotal: jobs.length });
  };
}

// ====== 14. Looking at a tar ======
// What a tar holds and whether it is whole, offline: ours, OCI archives, docker save's old and new, crane's, skopeo's.

/** An image in a tar: by index.json where there is one, else by manifest.json. Layers are in order. */
interface FoundImage {
  readonly name: string;
  readonly digest: string;
  readonly platform: string;
  readonly config: string;
  readonly layers: readonly { readonly entry: string; readonly mediaType: string; readonly size?: number }[];
}

async function readEntry({ handle, entries }: OpenTar, name: string, where: string): Promise<unknown> {
  const entry = entries.get(name);
  if (!entry) return undefined;
  if (entry.sizeBytes > LIMITS.tarMetadataBytes) fail("BAD_TAR", `${where}: ${name} is too large`);
  return parseJson(await readAt(handle, entry.offset, entry.sizeBytes)) ?? fail("BAD_TAR", `${where}: ${name} is not JSON`);
}
/** Every image of a tar; what its indexes and manifests name and the tar does not hold goes to `missing`. */
async function findImages(tar: OpenTar, file: string, missing: Set<string>): Promise<FoundImage[]> {
  const images: FoundImage[] = [];
  const visit = async (entry: Descriptor, name: string, depth: number): Promise<void> => {
    const json = await readEntry(tar, blobPath(entry.digest), file);
    if (json === undefined) return void missing.add(blobPath(entry.digest));
    const manifest = parseManifest({ mediaType: entry.mediaType, digest: entry.digest, bytes: encodeJson(json) }, file);
    if (manifest.kind === "index") {
      if (depth < LIMITS.indexDepth) for (const child of manifest.manifests) await visit(child, name, depth + 1);
      return;
    }
    const config = CONFIG_TYPES.includes(manifest.config.mediaType) ? blobPath(manifest.config.digest) : "";
    for (const { digest } of [manifest.config, ...manifest.layers]) if (!tar.entries.has(blobPath(digest))) missing.add(blobPath(digest));
    const layers = manifest.layers.map(({ digest, mediaType, size }) => ({ entry: blobPath(digest), mediaType, size }));
    const platform = config === "" ? entry.platform : parsePlatform(((await readEntry(tar, config, file)) ?? {}) as Record<string, unknown>);
    images.push({ name, digest: entry.digest, platform: formatPlatform(platform), config, layers });
  };
  const index = await readEntry(tar, "index.json", file);
  const docker = await readEntry(tar, "manifest.json", file);
  if (isRecord(index) && Array.isArray(index.manifests)) {
    for (const value of index.manifests as unknown[]) {
      const { annotations } = value as Descriptor;
      const name = annotations?.["io.containerd.image.name"] ?? annotations?.["org.opencontainers.image.ref.name"] ?? "";
      await visit(parseDescriptor(value, file), printable(name), 1);
    }
  } else if (Array.isArray(docker)) {
    for (const { Config: config = "", RepoTags: tags, Layers: names = [] } of docker as { Config?: string; RepoTags?: string[]; Layers?: string[] }[]) {
      const platform = parsePlatform(((await readEntry(tar, config, file)) ?? {}) as Record<string, unknown>);
      for (const entry of [config, ...names]) if (!tar.entries.has(entry)) missing.add(printable(entry));
      const layers = names.map((entry) => ({ entry, mediaType: "", ...given({ size: tar.entries.get(entry)?.sizeBytes }) }));
      images.push({ name: (tags ?? []).map((tag) => printable(tag)).join(" "), digest: "", platform: formatPlatform(platform), config, layers });
    }
  } else {
    fail("BAD_TAR", `${file} holds no image: neither an index.json nor a manifest.json`);
  }
  return images;
}
/** A table for a person, a line of JSON for each image otherwise. */
async function listTar(io: CommandIO, file: string): Promise<void> {
  const tar = await openTar(file);
  try {
    for (const { name, digest, platform, layers } of await findImages(tar, file, new Set())) {
      const rows = layers.map(({ entry, size = 0 }) => ({ digest: digestInName(entry) ?? entry, size, present: tar.entries.has(entry) }));
      const row = { name, digest, platform, sizeBytes: sumOf(rows, ({ size }) => size), layers: rows };
      const table = [`${name || "(no name)"}  ${platform}  ${formatBytes(row.sizeBytes)}`, ...(digest ? [`  ${digest}`] : []),
        ...rows.map((layer) => `  ${formatBytes(layer.size).padStart(8)}  ${layer.digest}${layer.present ? "" : "  not here"}`)];
      io.stdout.write(io.stdout.isTTY ? `${table.join("\n")}\n` : `${JSON.stringify(row)}\n`);
    }
  } finally {
    await tar.handle.close();
  }
}
/** The digest of a layer's content, unpacked: what the config's diff_ids have. Undefined where Node cannot unpack it. */
async function diffIdOf({ handle }: OpenTar, { offset, sizeBytes }: TarEntry): Promise<string | undefined> {
  const magic = (await readAt(handle, offset, 4)).toString("hex");
  const { createZstdDecompress } = zlib as { createZstdDecompress?: () => zlib.Gunzip };
  const isZstd = magic === "28b52ffd";
  if (isZstd && !createZstdDecompress) return undefined;
  const hash = createHash("sha256");
  if (sizeBytes === 0) return `sha256:${hash.digest("hex")}`;
  const stream = handle.createReadStream({ start: offset, end: offset + sizeBytes - 1, autoClose: false, highWaterMark: MIB });
  const unpack = magic.startsWith("1f8b") ? zlib.createGunzip() : isZstd ? createZstdDecompress?.() : undefined;
  const sink = new Writable({ write: (chunk: Buffer, _encoding, callback) => (hash.update(chunk), callback()) });
  await (unpack ? pipeline(stream, unpack, sink) : pipeline(stream, sink));
  return `sha256:${hash.digest("hex")}`;
}
/** Hashes every blob again, looks for every reference, unpacks every layer. Throws BAD_TAR naming all that is wrong. */
async function verifyTar(io: CommandIO, file: string): Promise<void> {
  const tar = await openTar(file);
  try {
    const problems: string[] = [];
    for (const [digest, { name, offset, sizeBytes }] of tar.blobs) {
      const descriptor = { mediaType: "", digest, size: sizeBytes };
      // docker save before 25 and skopeo name entries by other digests than the bytes': the diff_ids below are theirs.
      const isNamedByContent = name.startsWith("blobs/") || name.endsWith(".json") || name.endsWith(".gz");
      if (isNamedByContent && !(await isIntact({ handle: tar.handle, offset }, descriptor))) problems.push(`${digest} is damaged`);
    }
    const missing = new Set<string>();
    const images = problems.length > 0 ? [] : await findImages(tar, file, missing);
    let unpacked = 0;
    for (const { config, layers, name } of images) {
      const json = await readEntry(tar, config, file);
      const { diff_ids: ids } = (isRecord(json) && isRecord(json.rootfs) ? json.rootfs : {}) as { diff_ids?: string[] };
      for (const [at, { entry }] of layers.entries()) {
        const link = tar.entries.get(entry);
        const target = link?.type === "2" ? tar.entries.get(path.posix.join(path.posix.dirname(entry), link.linkName)) : link;
        if (!target || !ids) continue;
        const diffId = await diffIdOf(tar, target).catch(() => "what cannot be unpacked");
        if (diffId !== undefined) unpacked += 1;
        if (diffId !== undefined && diffId !== ids[at]) problems.push(`${entry} of ${name} is ${diffId}, its config says ${ids[at]}`);
      }
    }
    for (const name of missing) problems.push(`${name} is missing${name.startsWith("blobs/") ? " (a --since tar needs its base)" : ""}`);
    if (problems.length > 0) fail("BAD_TAR", `${file}: ${problems.join(`\nimgpull: ${file}: `)}`);
    const types = images.flatMap(({ layers }) => layers.map(({ mediaType }) => mediaType));
    const oldDocker = types.some((type) => type.includes("zstd")) ? "docker from 23 on" : "docker";
    const loaders = [...(tar.entries.has("manifest.json") ? [oldDocker, "podman", "skopeo docker-archive:"] : []),
      ...(tar.entries.has("oci-layout") ? ["ctr", "skopeo oci-archive:"] : [])];
    io.stdout.write(`${file}: ${images.length} images, ${tar.blobs.size} blobs hashed, ${unpacked} layers unpacked: all is right\n`);
    io.stdout.write(`loads in ${loaders.join(", ")}\n`);
  } finally {
    await tar.handle.close();
  }
}

// ====== 15. Command line ======
// One table of options, from which parsing, help, --parsed and the README's come. stdout is data, stderr is talk. SPEC §1, §8.

interface OptionSpec {
  readonly name: string;
  readonly short?: string;
  /** The value's name; an option without one is a switch. */
  readonly value?: string;
  readonly help: string;
  readonly isSecret?: true;
  readonly isRepeatable?: true;
  /** The option belongs to one registry: not with IMAGEs on several hosts. */
  readonly isForOneHost?: true;
}

const OPTION_GROUPS: readonly (readonly [title: string, options: readonly OptionSpec[]])[] = [
  ["What to pull", [
    { name: "os", short: "o", value: "OS", help: "operating system wanted; default: this machine's" },
    { name: "arch", short: "a", value: "ARCH", help: "processor wanted (amd64, arm64, arm ...)" },
    { name: "variant", value: "V", help: "processor variant wanted (v7, v8 ...)" },
    { name: "platform", value: "OS/ARCH[/V]", help: "the three in one word; all takes every platform" },
    { name: "from", value: "FILE", help: "read more IMAGEs, one a line; - is stdin" },
    { name: "name", value: "NAME", help: "the name that the image gets in the tar" },
    { name: "reuse", value: "TAR", isRepeatable: true, help: "take blobs from a tar that exists (repeatable)" },
    { name: "since", value: "TAR", help: "leave out layers that this tar holds" },
  ]],
  ["Registry", [
    { name: "ns", short: "n", value: "HOST", isForOneHost: true, help: "the registry that a mirror stands for (?ns=)" },
    { name: "scheme", short: "s", value: "https|http", help: "default https" },
    { name: "user", short: "u", value: "NAME", isForOneHost: true, help: "user name for basic authentication" },
    { name: "password", short: "p", value: "WORD", isForOneHost: true, isSecret: true, help: "its password" },
    { name: "password-stdin", help: "read the password from stdin" },
    { name: "token", short: "t", value: "TOKEN", isForOneHost: true, isSecret: true, help: "sent as Authorization: Basic TOKEN" },
    { name: "cert", short: "c", value: "FILE", isForOneHost: true, help: "client certificate (PEM)" },
    { name: "key", short: "k", value: "FILE", isForOneHost: true, help: "its key (PEM)" },
    { name: "cacert", short: "x", value: "FILE", help: "trust this CA as well (PEM); alias --ca" },
    { name: "insecure", short: "i", help: "do not verify the server's certificate" },
    { name: "concurrency", short: "j", value: "N", help: "connections used at once; default 8" },
    { name: "retries", value: "N", help: "attempts after the first; default 5" },
    { name: "timeout", value: "SECONDS", help: "how long a connection may be silent; default 30" },
  ]],
  ["Look, do not pull", [
    { name: "manifest", short: "m", value: "list|image", help: "print the manifest" },
    { name: "list-tar", short: "l", value: "TAR", help: "say what a tar holds, offline" },
    { name: "verify", value: "TAR", help: "hash a tar again, offline" },
    { name: "parsed", help: "print the parsed command line as JSON" },
    { name: "quiet", short: "q", help: "no progress" },
    { name: "version", short: "v", help: "print the version" },
    { name: "help", short: "h", help: "print this help" },
  ]],
];
const OPTIONS = OPTION_GROUPS.flatMap(([, options]) => options);

function helpText(): string {
  const row = ({ name, short, value, help }: OptionSpec) =>
    `  ${short ? `-${short}, ` : "    "}${`--${name}${value ? ` ${value}` : ""}`.padEnd(24)}${help}`;
  return [
    "imgpull [options] IMAGE [IMAGE...] [DEST]    pull images into one verified tar",
    "DEST: a file; - for stdout; a directory or NAME/ for an OCI layout",
    ...OPTION_GROUPS.flatMap(([title, options]) => [`${title}:`, ...options.map(row)]),
    "Examples:",
    "  imgpull alpine:3.22 alpine.tar && docker load -i alpine.tar",
    "  imgpull ghcr.io/org/app:1 --platform linux/arm64 - | ssh host podman load",
    "  imgpull --from images.txt bundle.tar > images.lock",
    "",
  ].join("\n");
}

const usage = (reason: string): never => fail("BAD_OPTION", `${reason} (imgpull --help)`);
/** How many pairs of neighbouring letters two names share, to name the option that was meant. */
const likeness = (left: string, right: string): number =>
  [...`^${left}`].filter((letter, at) => `^${right}$`.includes(letter + (left[at] ?? "$"))).length;

function parseCommandLine(argv: readonly string[]) {
  const options = Object.fromEntries([...OPTIONS, { name: "ca", value: "FILE" } as OptionSpec].map(({ name, short, value }) =>
    [name, { type: value ? "string" : "boolean", ...given({ short }) } as { type: "string" }]));
  const { tokens } = parseArgs({ args: [...argv], options, strict: false, allowPositionals: true, tokens: true });
  const values: Record<string, string> = {};
  const switches = new Set<string>();
  const [reuse, positionals]: [string[], string[]] = [[], []];
  for (const token of tokens) {
    if (token.kind === "positional") positionals.push(token.value);
    if (token.kind !== "option") continue;
    const { rawName, inlineValue } = token;
    const name = token.name === "ca" ? "cacert" : token.name;
    const spec = OPTIONS.find((option) => option.name === name);
    if (!spec) {
      const [nearest] = OPTIONS.map((option) => ({ ...option, like: likeness(name, option.name) }))
        .filter(({ like }) => like >= 0.4 * (name.length + 1)).sort((left, right) => right.like - left.like);
      return usage(`unknown option ${printable(rawName, 60)}${nearest ? `: did you mean --${nearest.name}?` : ""}`);
    }
    if (values[name] !== undefined || switches.has(name)) usage(`--${name} is given twice`);
    const value = rawName.startsWith("--") || !inlineValue ? token.value : token.value?.replace(/^=/, "");
    if (!spec.value) {
      if (value !== undefined) usage(`${rawName} takes no value`);
      switches.add(name);
    } else if (!value || (!inlineValue && value.startsWith("-") && value !== "-")) {
      usage(`${rawName} needs a value (${spec.value})`);
    } else if (spec.isRepeatable) {
      reuse.push(value);
    } else {
      values[name] = value;
    }
  }
  return { values, switches, reuse, positionals };
}
/** The command line in the words of the library, checked as far as that goes without reading anything. */
function planCommand({ values, switches, reuse, positionals }: ReturnType<typeof parseCommandLine>) {
  const { platform, user: username, password, token, cert: tlsCert, key: tlsKey, cacert: caCert, ns: namespace, from, name, since } = values;
  const isAll = platform === "all";
  const isPasswordOnStdin = switches.has("password-stdin");
  if (platform !== undefined && (values.os ?? values.arch ?? values.variant) !== undefined) usage("--platform excludes --os, --arch and --variant");
  if (platform !== undefined && !isAll && !/^[^/]+\/[^/]+(\/[^/]+)?$/.test(platform)) {
    usage(`--platform is OS/ARCH, OS/ARCH/VARIANT or all, not "${printable(platform)}"`);
  }
  const [osType, archType, variant] = platform === undefined || isAll ? [values.os, values.arch, values.variant] : platform.split("/");
  const choice = <T extends string>(option: string, choices: T[]): T | undefined => {
    const value = values[option];
    return value === undefined ? undefined : choices.find((each) => each === value)
      ?? usage(`--${option} is ${choices.join(" or ")}, not "${printable(value)}"`);
  };
  const number = (option: string, minimum: number, maximum: number, pattern = /^\d+$/) => {
    const value = values[option];
    if (value === undefined || (pattern.test(value) && Number(value) >= minimum && Number(value) <= maximum)) return value && Number(value);
    return usage(`--${option} is a ${pattern.test("0.5") ? "" : "whole "}number from ${minimum} to ${maximum}, not "${printable(value)}"`);
  };
  if (username !== undefined && password === undefined && !isPasswordOnStdin) usage("--user needs --password or --password-stdin");
  if (password !== undefined && isPasswordOnStdin) usage("--password and --password-stdin exclude each other");
  if (isPasswordOnStdin && username === undefined) usage("--password-stdin needs --user");
  if (isPasswordOnStdin && from === "-") usage("stdin is asked for twice: --password-stdin and --from -");
  const timeout = number("timeout", 0.001, 86_400, /^\d+(\.\d+)?$/);
  const opts = given({
    scheme: choice("scheme", ["https", "http"]), osType, archType, variant, username, password, token, tlsCert, tlsKey, caCert,
    insecure: switches.has("insecure") || undefined, namespace, concurrency: number("concurrency", 1, 64) || undefined,
    retries: number("retries", 0, 100), timeoutMs: timeout ? Math.ceil(timeout * 1000) : undefined,
  }) as Omit<PullerOpts, "url">;
  settingsOf({ url: "", ...opts, ...(isPasswordOnStdin ? { password: "" } : {}) }, {});
  const manifest = choice("manifest", ["list", "image"]);
  const isLooking = values["list-tar"] !== undefined || values.verify !== undefined;
  const hasDestination = manifest === undefined && positionals.length > (from === undefined ? 1 : 0);
  const destination = hasDestination ? positionals.at(-1) : undefined;
  const images = manifest === undefined ? positionals.slice(0, hasDestination ? -1 : undefined) : positionals.slice(0, 1);
  if (isLooking && positionals.length > 0) usage("--list-tar and --verify take no IMAGE");
  if (!isLooking && images.length === 0 && from === undefined) usage("IMAGE is missing");
  if (!isLooking && manifest === undefined && from !== undefined && destination === undefined) usage("DEST is missing");
  if (name !== undefined && (images.length !== 1 || from !== undefined)) usage("--name goes with one IMAGE");
  const bound = OPTIONS.find((option) => option.isForOneHost && values[option.name] !== undefined)?.name;
  return { opts, images, destination, manifest, from, name, since, reuse, isAll, isPasswordOnStdin, isQuiet: switches.has("quiet"), bound };
}
/** `imgpull alpine:3 busybox:1` means two images, not a file called busybox:1. */
function checkDestinationName(destination: string): void {
  if (/[\\/]|\.(tar|oci|img|tgz|zip|gz)$/i.test(destination) || !/[:@]/.test(destination)) return;
  try {
    parseReference(destination);
  } catch {
    return;
  }
  usage(`DEST is missing: "${destination}" reads as an IMAGE; say ./${destination} to mean a file`);
}
/** @internal The streams that a command runs with; tests give their own. */
type CommandIO = Readonly<{
  stdin: NodeJS.ReadableStream; stdout: NodeJS.WritableStream & { isTTY?: boolean };
  stderr: NodeJS.WritableStream & { isTTY?: boolean; columns?: number }; environment: Environment;
}>;

async function readStdin({ stdin }: CommandIO): Promise<string> {
  const chunks: Buffer[] = [];
  for await (const chunk of stdin) chunks.push(Buffer.from(chunk as Uint8Array));
  return Buffer.concat(chunks).toString("utf8");
}
/** Progress on stderr: redrawn in place on a terminal, a plain line for each blob and every ten seconds elsewhere. */
function showProgress({ stderr, environment }: CommandIO, isQuiet: boolean) {
  const isLive = stderr.isTTY === true && !isQuiet && environment.TERM !== "dumb";
  const dim = (text: string) => (environment.NO_COLOR ? text : `\u001b[2m${text}\u001b[22m`);
  const startedAtMs = performance.now();
  const seconds = () => (performance.now() - startedAtMs) / 1000;
  let latest: Transfer | undefined;
  let drawnLines = 0;
  const clear = () => {
    if (drawnLines > 0) stderr.write(`\u001b[${drawnLines}A\r\u001b[J`); // up, to the line's start, erase below
    drawnLines = 0;
  };
  const total = ({ jobs, totalBytes, fetchedBytes }: Transfer) => {
    const doneBytes = sumOf(jobs, (job) => job.doneBytes);
    const rate = fetchedBytes / Math.max(0.001, seconds());
    const left = rate > 0 ? `, ${Math.ceil((totalBytes - doneBytes) / rate)} s left` : "";
    return `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${formatBytes(rate)}/s${left}`;
  };
  const bar = ({ descriptor: { digest, size }, doneBytes }: BlobJob, width: number) => {
    const label = `${hexOf(digest).slice(0, 12)} ${formatBytes(doneBytes)}/${formatBytes(size)} `;
    const room = Math.min(30, width - label.length - 2);
    const filled = Math.round((Math.max(0, room) * doneBytes) / Math.max(1, size));
    return room < 5 ? label : `${label}[${"#".repeat(filled)}${" ".repeat(room - filled)}]`;
  };
  const draw = () => {
    if (!latest) return;
    if (!isLive) return void stderr.write(`imgpull: ${total(latest)}\n`);
    const width = Math.max(20, (stderr.columns ?? 80) - 1);
    const moving = [...new Set([...latest.active].map(({ job }) => job))].slice(0, 12);
    const lines = [...moving.map((job) => dim(bar(job, width).slice(0, width))), total(latest).slice(0, width)];
    clear();
    stderr.write(lines.map((line) => `${line}\n`).join(""));
    drawnLines = lines.length;
  };
  const timer = isQuiet ? undefined : setInterval(draw, isLive ? 100 : 10_000).unref();
  return {
    seconds,
    observe: (transfer: Transfer, finished?: BlobJob) => {
      latest = transfer;
      if (!finished || isQuiet || isLive) return;
      stderr.write(`imgpull: ${finished.descriptor.digest.slice(0, 19)} ${formatBytes(finished.descriptor.size)} done\n`);
    },
    say: (text: string) => {
      clear();
      stderr.write(`imgpull: ${text}\n`);
    },
    stop: () => {
      clearInterval(timer);
      clear();
      latest = undefined;
    },
  };
}
/** The images of the command line and of --from, each once, with the names they get. */
async function listImages(io: CommandIO, command: ReturnType<typeof planCommand>): Promise<PullRequest["images"]> {
  const { from, name: givenName, bound, opts: { namespace } } = command;
  const list = from === undefined ? "" : from === "-" ? await readStdin(io)
    : await fs.readFile(from, "utf8").catch((error: unknown) => usage(`cannot read --from ${from}: ${diskWords(error)}`));
  const lines = list.split(/\r?\n/).map((line) => line.replace(/(^|\s)#.*$/, "").trim()).filter(Boolean);
  const texts = [...command.images, ...lines];
  if (texts.length === 0) usage("no IMAGE is given");
  const references = await mapConcurrently(texts, 1, async (text) => parseReference(text)); // every bad one is named
  const hosts = [...new Set(references.map(({ host }) => host))];
  if (hosts.length > 1 && bound) usage(`--${bound} belongs to one registry, and the IMAGEs are on ${hosts.join(", ")}`);
  const unique = new Map(references.map((reference) => [formatReference(reference), reference]));
  const images = [...unique.values()].map((reference) => {
    const named = givenName === undefined ? imageName(reference, namespace) : parseReference(givenName);
    return { reference, name: formatReference(named) };
  });
  const names = images.map(({ name }) => name);
  const doubled = names.find((name, at) => names.indexOf(name) !== at);
  if (doubled !== undefined) usage(`two IMAGEs would have the name ${doubled} in the tar`);
  return images;
}

async function runCommand(argv: readonly string[], io: CommandIO, signal: AbortSignal): Promise<void> {
  const { stdout, stderr, environment } = io;
  const line = parseCommandLine(argv);
  if (line.switches.has("help")) return void stdout.write(helpText());
  if (line.switches.has("version")) return void stdout.write(`imgpull version: ${IMGPULL_VERSION} build date: ${IMGPULL_BUILD_DATE}\n`);
  const { opts, bound: _bound, ...rest } = planCommand(line);
  const command = { opts, bound: _bound, ...rest };
  const { isAll, reuse, since, isQuiet } = command;
  if (line.switches.has("parsed")) {
    const secrets = OPTIONS.filter(({ name, isSecret }) => isSecret && name in opts).map(({ name }) => [name, "***"]);
    return void stdout.write(`${JSON.stringify({ ...rest, ...opts, ...Object.fromEntries(secrets) }, null, 2)}\n`);
  }
  if (line.values["list-tar"] !== undefined) return listTar(io, line.values["list-tar"]);
  if (line.values.verify !== undefined) return verifyTar(io, line.values.verify);
  const images = await listImages(io, command);
  const { reference } = images[0] as PullRequest["images"][number];
  const destination = command.destination ?? defaultDestination(reference);
  if (command.destination !== undefined) checkDestinationName(destination);
  // /dev/stdout by whatever name: it may be a socket, which cannot be opened, and the tar must not be followed by talk.
  const [there, own] = await Promise.all([destination, "/dev/stdout"].map((name) => fs.stat(name).catch(() => undefined)));
  const isStream = destination === "-" || (there !== undefined && !there.isFile() && there.ino === own?.ino && there.dev === own.dev);
  if (isStream && stdout.isTTY) usage("the tar is not written to a terminal: redirect stdout");
  const password = command.isPasswordOnStdin ? { password: (await readStdin(io)).replace(/\r?\n$/, "") } : {};
  const progress = showProgress(io, isQuiet);
  const pullerOpts: PullerOpts = { ...opts, ...password, url: formatReference(reference), signal, onWarning: progress.say };
  try {
    if (command.manifest !== undefined) {
      const { bytes, digest, manifest } = await new Puller(pullerOpts).pullManifest(command.manifest);
      stdout.write(stdout.isTTY ? `${JSON.stringify(manifest, null, 2)}\n` : bytes);
      return void stderr.write(`${digest}\n`);
    }
    const request = { images, destination: isStream ? stdout : destination, isAll, reuse, ...given({ since }) };
    const pull = (session: Session) => pullImages(session, request, progress.observe);
    const { results, transfer, plan } = await withSession(pullerOpts, pull, { environment });
    progress.stop();
    const pinned = images.map((image, at) => formatReference({ ...image.reference, digest: results[at]?.digest as string }));
    if (!isStream) stdout.write(pinned.map((each) => `${each}\n`).join(""));
    if (isQuiet) return;
    const counts = [[transfer.fetchedBytes, "fetched"], [transfer.reusedBytes, "reused"], [transfer.resumedBytes, "resumed"]] as const;
    const parts = counts.filter(([bytes], at) => at === 0 || bytes > 0).map(([bytes, how]) => `${formatBytes(bytes)} ${how}`);
    const what = `${images.length === 1 ? "1 image" : `${images.length} images`}, ${formatBytes(plan.sizeBytes)}`;
    progress.say(`${what} in ${isStream ? "the stream" : destination}: ${parts.join(", ")}, ${progress.seconds().toFixed(1)} s`);
  } finally {
    progress.stop();
  }
}
/** @internal Runs the command; resolves to its exit code: 0 done, 1 failed, 2 usage, 130 SIGINT, 143 SIGTERM. */
async function main(argv: readonly string[], io?: CommandIO): Promise<number> {
  const { stdin, stdout, stderr, env: environment } = process;
  const used = io ?? { stdin, stdout, stderr, environment };
  const stop = new AbortController();
  let signalCode = 0;
  const interrupt = (name: NodeJS.Signals) => {
    if (signalCode !== 0) process.exit(signalCode); // asked twice: at once
    signalCode = name === "SIGINT" ? 130 : 143;
    stop.abort();
  };
  if (!io) {
    process.on("SIGINT", interrupt).on("SIGTERM", interrupt);
    for (const stream of [stdout, stderr]) stream.on("error", () => undefined); // a reader that has gone is met elsewhere
  }
  try {
    await runCommand(argv, used, stop.signal);
    return 0;
  } catch (error) {
    if (signalCode !== 0) return signalCode;
    if (!(error instanceof ImgpullError)) throw error;
    if (errorCodeOf(error.cause) !== "EPIPE") used.stderr.write(`imgpull: ${error.message}\n`);
    return error.code === "BAD_REFERENCE" || error.code === "BAD_OPTION" ? 2 : 1;
  } finally {
    if (!io) process.off("SIGINT", interrupt).off("SIGTERM", interrupt);
  }
}

// ====== 16. Exports ======

/** @internal for the tests */
const internals = Object.freeze({
  LIMITS, OPTIONS, acceptableVariants, addRange, apiHost, defaultDestination, digestInName, encodeTarHeader,
  findCredential, formatBytes, formatReference, helpText, hostPlatform, imageName, isExemptFromProxy, isRetriable, matchPlatform,
  missingRanges, normalizeAuthKey, parseChallenges, parseCommandLine, parseManifest, parseReference, parseRetryAfter, planCommand,
  planTar, printable, proxyFor, pullImages, readTar, redactUrl, resolveImage, retryDelayMs, settingsOf, systemCertificates,
  wantedPlatform, withSession,
});

export { ImgpullError, Puller, internals, main, newPullerOpts };
export type { Descriptor, ErrorCode, ManifestHolder, Platform, Progress, PullerOpts, PullResult };
