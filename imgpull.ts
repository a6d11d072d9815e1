/*
 * imgpull: pull container images from an OCI registry into one verified tar. It only pulls.
 *
 *    1 imports, media types, limits   2 public types        3 errors            4 primitives
 *    5 references                     6 transport           7 retry             8 credentials and tokens
 *    9 registry                      10 manifests          11 tar              12 pull
 *   13 Puller                        14 looking at a tar   15 command line     16 exports
 *
 * Data flows one way: options → references → manifests → plan (every entry with its offset) → bytes in place → DEST.
 *
 * Requests made: GET and HEAD /v2/REPOSITORY/manifests/…, GET /v2/REPOSITORY/blobs/…, what these redirect to, the
 * token endpoint that the registry names (GET, or POST for an identity token), CONNECT to a proxy, and the `urls` of
 * a foreign layer that the registry does not have. Nothing else is contacted.
 *
 * Files read: --cert, --key, --cacert, --from, --reuse, --since, the tar to look at; the credential files of section 8;
 * the system's certificate store and /etc/docker/certs.d (section 6). Files written: DEST, and while it is being made
 * DEST.partial, DEST.partial.journal, DEST.partial.lock. Programs run: docker-credential-NAME, where a credential
 * file names it.
 *
 * Environment read: HOME, DOCKER_CONFIG, DOCKER_AUTH_CONFIG, REGISTRY_AUTH_FILE, XDG_RUNTIME_DIR, SSL_CERT_FILE,
 * SSL_CERT_DIR, NODE_EXTRA_CA_CERTS, HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY (and lower case), NO_COLOR.
 *
 * Not here on purpose: push, serve, build, run, sign, convert, recompress, schema 1, a cache outside DEST.
 */

// ====== 1. Imports, media types, limits ======

import { spawn } from "node:child_process";
import { createHash, type Hash } from "node:crypto";
import * as fs from "node:fs/promises";
import * as http from "node:http";
import * as https from "node:https";
import * as net from "node:net";
import * as os from "node:os";
import * as path from "node:path";
import { type Readable, Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import * as tls from "node:tls";
import { parseArgs } from "node:util";
import * as zlib from "node:zlib";

declare const IMGPULL_VERSION: string;
declare const IMGPULL_BUILD_DATE: string;

const DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX = "application/vnd.oci.image.index.v1+json";
const MANIFEST_TYPES = [OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST];
const IMAGE_CONFIG_TYPES = [
  "application/vnd.docker.container.image.v1+json",
  "application/vnd.oci.image.config.v1+json",
];

const KIB = 1024;
const MIB = 1024 * KIB;

/** Every bound in one place. What a registry can make us hold in memory is here, whatever it sends. */
const LIMITS = Object.freeze({
  manifestBytes: 4 * MIB, // the distribution specification's own floor for registries
  configBytes: 16 * MIB,
  tokenBytes: MIB,
  errorBodyBytes: 64 * KIB,
  credentialFileBytes: 4 * MIB,
  indexDepth: 4,
  indexEntries: 1024, // with `--platform all` each entry is a request
  redirects: 10,
  tokenFloorMs: 60_000, // the token specification's default, and more than GitLab's skewed clocks take away
  firstBackoffMs: 1000,
  backoffMs: 30_000,
  retryAfterMs: 120_000, // longer waits are the user's to decide
  batchBytes: MIB, // one write to disk: fewer trips to Node's thread pool than one for each chunk
  journalBytes: 4 * MIB, // how much a kill -9 may cost each connection
  splitBytes: MIB, // neither half of a range that is cut in two is smaller
  fastLineBytesPerSecond: 256 * MIB, // from here on the processor is the limit, and more connections only cost
  farLatencyMs: 10, // from here on a line is worth several connections before its speed is known
  streamUnitBytes: 4 * MIB, // DEST `-`: one request's share of a large blob
  streamWindowBytes: 32 * MIB, // DEST `-`: how far the line may be ahead of the reader
  tarMetadataBytes: 16 * MIB, // index.json and the like of a tar that someone else made
});

// ====== 2. Public types ======

/** An operating system and processor in Go's words: `{ os: "linux", architecture: "arm", variant: "v7" }`. */
interface Platform {
  os: string;
  architecture: string;
  variant?: string;
}

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
  /** Connections used at once; default 8. */
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

/** What DEST now holds. `digest` is the manifest's (the index's when every platform was asked for). */
interface PullResult {
  name: string;
  digest: string;
  /** `os/architecture[/variant]`, `all`, or the empty string for what is not an image. */
  platform: string;
  layers: number;
  /** Size of DEST: of the tar, or of the blobs put into a directory. */
  sizeBytes: number;
  /** What came over the line as blobs; the rest was there already. */
  fetchedBytes: number;
}

/** A manifest as the registry sent it. `bytes` has the digest; `manifest` is the parsed JSON. */
interface ManifestHolder {
  mediaType: string;
  digest: string;
  bytes: Uint8Array;
  manifest: unknown;
  imageUrl: string;
}

type ErrorCode =
  | "BAD_REFERENCE" | "BAD_OPTION" | "NOT_FOUND" | "UNAUTHORIZED" | "FORBIDDEN" | "RATE_LIMITED" | "NO_PLATFORM"
  | "NOT_AN_IMAGE" | "UNSUPPORTED" | "TOO_LARGE" | "DIGEST_MISMATCH" | "SIZE_MISMATCH" | "PROTOCOL" | "NETWORK"
  | "TIMEOUT" | "TLS" | "CREDENTIALS" | "PROXY" | "DISK" | "BAD_TAR" | "ABORTED";

// ====== 3. Errors ======
// One class with a code. The message is what failed, then the request and the registry's words, then the remedy.

/** The only error thrown on purpose; anything else is a bug. `status` is the HTTP status, where there was one. */
class ImgpullError extends Error {
  override readonly name = "ImgpullError";
  readonly code: ErrorCode;
  readonly status?: number;
  /** @internal how long the server asks us to stay away */
  readonly retryAfterMs?: number;

  constructor(
    code: ErrorCode,
    message: string,
    more: { status?: number | undefined; retryAfterMs?: number | undefined; cause?: unknown } = {},
  ) {
    super(message, more.cause === undefined ? undefined : { cause: more.cause });
    this.code = code;
    if (more.status !== undefined) this.status = more.status;
    if (more.retryAfterMs !== undefined) this.retryAfterMs = more.retryAfterMs;
  }
}

function errorCodeOf(error: unknown): string {
  const code = (error as { code?: unknown } | undefined)?.code;
  return typeof code === "string" ? code : "";
}

/** Text from outside, fit for a terminal: no control characters or escapes, no line breaks, bounded. */
function printable(text: string, maximum = 300): string {
  // C0, DEL, C1, and the bidirectional and line controls that reorder what a person reads.
  const clean = text.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g, " ").trim();
  return clean.length > maximum ? `${clean.slice(0, maximum)}…` : clean;
}

/** A URL without user, password and query (which may be a signature); `?ns=` is ours and is kept. */
function redactUrl(url: URL | string): string {
  const copy = new URL(url);
  const namespace = copy.searchParams.get("ns");
  const shown = `${copy.protocol}//${copy.host}${copy.pathname}`;
  return printable(namespace === null ? shown : `${shown}?ns=${namespace}`);
}

const TLS_REMEDY: Record<string, string> = {
  CERT_HAS_EXPIRED: "the server's certificate has expired",
  ERR_TLS_CERT_ALTNAME_INVALID: "the server's certificate is for another name",
};

/** What Node says of a connection that failed, in the words of section 1's codes. */
function connectionError(error: unknown, doing: string): ImgpullError {
  if (error instanceof ImgpullError) return error;
  const cause = error as NodeJS.ErrnoException;
  const code = errorCodeOf(error);
  const words = printable(cause.message ?? String(error));
  if (code === "ABORT_ERR" || cause.name === "AbortError") return new ImgpullError("ABORTED", "stopped", { cause });
  // An https client that meets plain HTTP reads "HTTP/1.1" as a TLS record of an absurd version or length.
  if (/wrong version number|packet length too long|unknown protocol|record layer failure/i.test(words)) {
    return new ImgpullError("TLS", `${doing}: the server answers plain HTTP on this port\n  try --scheme http`, { cause });
  }
  const untrusted = /^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO|CERT_|INVALID_|ERR_TLS|ERR_SSL|EPROTO)/.test(code);
  if (untrusted && code !== "ERR_TLS_HANDSHAKE_TIMEOUT") {
    const unknownAuthority = /^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO)/.test(code);
    const remedy = unknownAuthority
      ? "\n  the certificate authority is not known here: give it with --cacert FILE, or go without the check by --insecure"
      : /certificate required|bad certificate|handshake failure/i.test(words)
        ? "\n  the server may want a client certificate: --cert FILE --key FILE"
        : "";
    return new ImgpullError("TLS", `${doing}: ${TLS_REMEDY[code] ?? words}${remedy}`, { cause });
  }
  if (code === "ENOTFOUND") return new ImgpullError("NETWORK", `${doing}: no such host`, { cause });
  const nested = (error as { errors?: unknown[] }).errors?.[0]; // happy eyeballs: one error for each address
  const said = words || printable(String((nested as Error | undefined)?.message ?? code));
  return new ImgpullError("NETWORK", `${doing}: ${code === "ECONNRESET" ? "connection lost" : said}`, { cause });
}

const DISK_WORDS: Record<string, string> = {
  ENOSPC: "the disk is full",
  EDQUOT: "the disk quota is used up",
  EROFS: "the file system is read-only",
  EACCES: "permission denied",
  EPERM: "permission denied",
  ERR_ACCESS_DENIED: "not allowed by Node's permission model",
  ENOENT: "no such file or directory",
  ENOTDIR: "a part of the path is not a directory",
  EISDIR: "it is a directory",
  EFBIG: "the file system does not take a file of that size",
};

function diskError(error: unknown, doing: string): ImgpullError {
  if (error instanceof ImgpullError) return error;
  const cause = error as NodeJS.ErrnoException;
  return new ImgpullError("DISK", `${doing}: ${DISK_WORDS[errorCodeOf(error)] ?? printable(cause.message)}`, { cause });
}

// ====== 4. Primitives ======
// Digests, sizes, JSON from outside. Nothing here knows of a registry.

const DIGEST_HEX_LENGTH: Record<string, number> = { sha256: 64, sha512: 128 };

/** A digest is checked here before it touches a path or a URL: algorithm known, lower-case hex, exact length. */
function isDigest(text: unknown): text is string {
  if (typeof text !== "string") return false;
  const [, algorithm, hex] = /^(sha256|sha512):([0-9a-f]+)$/.exec(text) ?? [];
  return algorithm !== undefined && hex?.length === DIGEST_HEX_LENGTH[algorithm];
}

function newHash(digest: string): Hash {
  return createHash(digest.slice(0, digest.indexOf(":")));
}

function digestOf(bytes: Uint8Array, like = "sha256:"): string {
  return `${like.slice(0, like.indexOf(":"))}:${newHash(like).update(bytes).digest("hex")}`;
}

function blobPath(digest: string): string {
  return `blobs/${digest.replace(":", "/")}`;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

function formatPlatform(platform: Platform | undefined): string {
  if (!platform) return "";
  return [platform.os, platform.architecture, platform.variant].filter(Boolean).join("/");
}

/** Runs at most `limit` at once, keeps the order, and lets every one end before the first error is thrown. */
async function mapConcurrently<T, R>(items: readonly T[], limit: number, run: (item: T) => Promise<R>): Promise<R[]> {
  const results: PromiseSettledResult<R>[] = [];
  let next = 0;
  const lane = async (): Promise<void> => {
    while (next < items.length) {
      const index = next++;
      const [settled] = await Promise.allSettled([run(items[index] as T)]);
      results[index] = settled;
    }
  };
  await Promise.all(Array.from({ length: Math.min(limit, items.length) }, lane));
  const failures = results.flatMap((result) => (result.status === "rejected" ? [result.reason as unknown] : []));
  if (failures.length > 0) throw joinErrors(failures);
  return results.map((result) => (result as PromiseFulfilledResult<R>).value);
}

/** Several references that failed are one error that names each, so that a list is mended in one go. */
function joinErrors(failures: unknown[]): unknown {
  const bug = failures.find((failure) => !(failure instanceof ImgpullError));
  if (bug !== undefined) return bug;
  const known = failures as ImgpullError[];
  const first = known.find((failure) => failure.code === "ABORTED") ?? (known[0] as ImgpullError);
  const messages = [...new Set(known.map((failure) => failure.message))];
  if (messages.length === 1 || first.code === "ABORTED") return first;
  return new ImgpullError(first.code, messages.join("\n"), { status: first.status, cause: first });
}

// ====== 5. References ======
// The grammar of the distribution specification ("Pulling manifests") and of the docker reference package. SPEC §2.

/** `host` is the name people use (`docker.io`); apiHost() says where its API is. */
interface Reference {
  readonly host: string;
  readonly repository: string;
  readonly tag?: string;
  readonly digest?: string;
}

const DOCKER_HUB_HOSTS = ["docker.io", "index.docker.io", "registry-1.docker.io"];
const HOST = /^(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*\.?|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?$/;
const REPOSITORY = /^[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:\/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*$/;
const TAG = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/;

function looksLikeHost(segment: string): boolean {
  return segment.includes(".") || segment.includes(":") || segment === "localhost";
}

/** Throws BAD_REFERENCE with the reason; nothing is asked of any registry for a reference that cannot be right. */
function parseReference(text: string): Reference {
  const refuse = (reason: string): never => {
    throw new ImgpullError("BAD_REFERENCE", `bad image reference "${printable(text)}": ${reason}`);
  };
  if (text === "") refuse("it is empty");
  if (/^[a-z]+:\/\//i.test(text)) refuse("write it without the scheme (use --scheme for http)");
  if (/[^\x21-\x7e]/.test(text)) refuse("it has a character that is not printable ASCII");
  const [named = "", digest, ...tooMany] = text.split("@");
  if (tooMany.length > 0) refuse("it has more than one @");
  if (digest !== undefined && !isDigest(digest)) {
    refuse(`"${printable(digest)}" is not a digest: sha256: and 64, or sha512: and 128 lower-case hex digits`);
  }
  const slash = named.indexOf("/");
  const first = named.slice(0, Math.max(slash, 0));
  const hasHost = slash > 0 && looksLikeHost(first);
  const givenHost = hasHost ? first : "docker.io";
  const rest = hasHost ? named.slice(slash + 1) : named;
  const colon = rest.lastIndexOf(":");
  const tag = colon < 0 ? undefined : rest.slice(colon + 1);
  let repository = colon < 0 ? rest : rest.slice(0, colon);
  const port = HOST.exec(givenHost)?.[1];
  if (!HOST.test(givenHost) || (port !== undefined && (Number(port) < 1 || Number(port) > 65535))) {
    refuse(`"${givenHost}" is not a host or host:port`);
  }
  if (givenHost.startsWith("[") && net.isIPv6(givenHost.slice(1, givenHost.indexOf("]"))) === false) {
    refuse(`"${givenHost}" is not an IPv6 address in brackets`);
  }
  if (repository === "") refuse("the repository is missing");
  if (repository !== repository.toLowerCase()) refuse("a repository is written in lower case");
  if (!REPOSITORY.test(repository)) refuse(`"${repository}" is not a repository name`);
  if (tag !== undefined && !TAG.test(tag)) refuse(`"${tag}" is not a tag`);
  const host = DOCKER_HUB_HOSTS.includes(givenHost.toLowerCase()) ? "docker.io" : givenHost;
  if (host === "docker.io" && !repository.includes("/")) repository = `library/${repository}`;
  if (host.length + repository.length + 1 > 255) refuse("host and repository are longer than 255 characters");
  return {
    host,
    repository,
    ...(tag !== undefined ? { tag } : digest === undefined ? { tag: "latest" } : {}),
    ...(digest !== undefined ? { digest } : {}),
  };
}

function formatReference(reference: Reference): string {
  const tag = reference.tag === undefined ? "" : `:${reference.tag}`;
  const digest = reference.digest === undefined ? "" : `@${reference.digest}`;
  return `${reference.host}/${reference.repository}${tag}${digest}`;
}

function apiHost(host: string): string {
  return host === "docker.io" ? "registry-1.docker.io" : host;
}

/**
 * The name an image gets in the tar. A mirror stands for another registry, told by --ns or by the path's first
 * segment; the tag names, and only a reference without one is named by its digest.
 */
function imageName(reference: Reference, namespace?: string): Reference {
  const upstream = namespace !== undefined ? `${namespace}/${reference.repository}` : reference.repository;
  const [first = "", ...more] = upstream.split("/");
  const isMirrored = namespace !== undefined || (first.includes(".") && more.length > 0);
  const bare = isMirrored ? upstream : `${reference.host}/${reference.repository}`;
  const suffix = reference.tag !== undefined ? `:${reference.tag}` : `@${reference.digest}`;
  return parseReference(`${bare}${suffix}`);
}

/** `NAME-TAG.tar`, in the working directory. */
function defaultDestination(reference: Reference): string {
  const name = reference.repository.slice(reference.repository.lastIndexOf("/") + 1);
  return `${name}-${reference.tag ?? reference.digest?.split(":")[1]?.slice(0, 12)}.tar`;
}

// ====== 6. Transport ======
// One request: certificates, proxy, silence, redirects. It knows no registry and keeps no bytes. SPEC §6, §7.
// Invariant: an Authorization header and a client certificate are chosen anew for each origin, never carried over.

type Environment = Readonly<Record<string, string | undefined>>;

interface TransportSettings {
  readonly tlsCert?: string;
  readonly tlsKey?: string;
  readonly caCert?: string;
  readonly insecure: boolean;
  readonly timeoutMs: number;
  readonly environment: Environment;
  /** /etc/docker/certs.d; named here so that tests can have one of their own. */
  readonly certsDirectory: string;
}

interface WireRequest {
  readonly method: string;
  readonly url: URL;
  readonly headers: Readonly<Record<string, string>>;
  readonly body?: string;
  /** The registry's own origin gets the client certificate and certs.d; storage hosts and token services do not. */
  readonly isRegistry: boolean;
  readonly signal: AbortSignal;
}

interface Transport {
  send(request: WireRequest): Promise<http.IncomingMessage>;
  close(): void;
}

async function readOptional(file: string): Promise<string | undefined> {
  try {
    return await fs.readFile(file, "utf8");
  } catch {
    return undefined;
  }
}

/** Where the distributions keep their bundle, in the order in which Go's crypto/x509 looks (root_linux.go, root_bsd.go). */
const CA_BUNDLES = [
  "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
  "/etc/pki/tls/cacert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
  "/usr/local/etc/ssl/cert.pem", "/usr/local/share/certs/ca-root-nss.crt", "/etc/openssl/certs/ca-certificates.crt",
];
const CA_DIRECTORIES = ["/etc/ssl/certs", "/etc/pki/tls/certs", "/system/etc/security/cacerts"];

/** The system's certificate store, as Go reads it; Node's own roots only where the system has none. */
async function systemCertificates(environment: Environment): Promise<string[]> {
  const found = new Set<string>();
  for (const file of environment.SSL_CERT_FILE ? [environment.SSL_CERT_FILE] : CA_BUNDLES) {
    const bundle = await readOptional(file);
    if (bundle !== undefined) {
      found.add(bundle);
      break;
    }
  }
  const named = environment.SSL_CERT_DIR?.split(path.delimiter);
  for (const directory of named ?? (found.size === 0 ? CA_DIRECTORIES : [])) {
    const names = await fs.readdir(directory).catch(() => []);
    const texts = await Promise.all(names.map((name) => readOptional(path.join(directory, name))));
    const bundle = [...found].join("\n");
    for (const text of texts) {
      if (text?.includes("-----BEGIN CERTIFICATE-----") && !bundle.includes(text.trim())) found.add(text);
    }
    if (found.size > 0 && !named) break;
  }
  // macOS and Windows keep theirs in no file; Node reads them since 22.15.
  const getCertificates = (tls as { getCACertificates?: (type: string) => string[] }).getCACertificates;
  const isFileless = process.platform === "darwin" || process.platform === "win32";
  if (found.size === 0 && isFileless) for (const text of getCertificates?.("system") ?? []) found.add(text);
  if (found.size === 0) for (const text of tls.rootCertificates) found.add(text);
  const extra = environment.NODE_EXTRA_CA_CERTS;
  const extraText = extra ? await readOptional(extra) : undefined;
  if (extraText !== undefined && ![...found].some((text) => text.includes(extraText.trim()))) found.add(extraText);
  return [...found];
}

async function readPem(file: string, option: string): Promise<string> {
  const text = await fs.readFile(file, "utf8").catch((error: unknown) => {
    throw new ImgpullError("TLS", `cannot read ${option} ${file}: ${DISK_WORDS[errorCodeOf(error)] ?? "unreadable"}`);
  });
  if (!text.includes("-----BEGIN ")) throw new ImgpullError("TLS", `${option} ${file} is not a PEM file`);
  return text;
}

/** `HOST:PORT` of certs.d: *.crt are authorities, *.cert with the *.key of the same name are for the client. */
async function readCertsDirectory(directory: string): Promise<{ ca: string[]; cert: string[]; key: string[] }> {
  const read = { ca: [] as string[], cert: [] as string[], key: [] as string[] };
  const names = await fs.readdir(directory).catch(() => []);
  for (const name of names.sort()) {
    const kind = name.endsWith(".crt") ? "ca" : name.endsWith(".cert") ? "cert" : name.endsWith(".key") ? "key" : undefined;
    if (kind) read[kind].push(await readPem(path.join(directory, name), "certificate"));
  }
  return read;
}

/** One context for each kind of peer: parsing a system's 150 certificates anew for each connection would show. */
function secureContexts(settings: TransportSettings): (url: URL, isRegistry: boolean) => Promise<tls.SecureContext> {
  const contexts = new Map<string, Promise<tls.SecureContext>>();
  const make = async (url: URL, isRegistry: boolean): Promise<tls.SecureContext> => {
    const ca = await systemCertificates(settings.environment);
    if (settings.caCert !== undefined) ca.push(await readPem(settings.caCert, "--cacert"));
    const forHost = isRegistry
      ? await readCertsDirectory(path.join(settings.certsDirectory, url.host))
      : { ca: [], cert: [], key: [] };
    if (isRegistry && settings.tlsCert !== undefined && settings.tlsKey !== undefined) {
      forHost.cert = [await readPem(settings.tlsCert, "--cert")];
      forHost.key = [await readPem(settings.tlsKey, "--key")];
    }
    try {
      return tls.createSecureContext({ ca: [...ca, ...forHost.ca], cert: forHost.cert, key: forHost.key });
    } catch (error) {
      throw new ImgpullError("TLS", `cannot use the certificates given: ${printable((error as Error).message)}`, {
        cause: error,
      });
    }
  };
  return (url, isRegistry) => {
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
  const family = net.isIP(host) === 6 ? "ipv6" : "ipv4";
  const loopback = new net.BlockList();
  loopback.addSubnet("127.0.0.0", 8, "ipv4");
  loopback.addAddress("::1", "ipv6");
  if (host === "localhost" || host.endsWith(".localhost")) return true;
  if (net.isIP(host) !== 0 && loopback.check(host, family)) return true;
  return noProxy.split(/[\s,]+/).filter(Boolean).some((entry) => {
    if (entry === "*") return true;
    const [block = "", prefix] = entry.split("/");
    if (prefix !== undefined && net.isIP(block) !== 0 && net.isIP(host) !== 0) {
      const bits = Number(prefix);
      if (!Number.isInteger(bits) || bits < 0 || bits > (net.isIP(block) === 6 ? 128 : 32)) return false;
      const list = new net.BlockList();
      list.addSubnet(block, bits, net.isIP(block) === 6 ? "ipv6" : "ipv4");
      return list.check(host, family);
    }
    const [, name = "", wantedPort] = /^(\[[^\]]*\]|[^:]*|.*:.*:.*?)(?::(\d+))?$/.exec(entry.toLowerCase()) ?? [];
    if (wantedPort !== undefined && wantedPort !== port) return false;
    const bare = name.replace(/^\[|\]$/g, "").replace(/^\*?\./, "");
    return bare !== "" && (host === bare || (net.isIP(host) === 0 && host.endsWith(`.${bare}`)));
  });
}

function proxyFor(url: URL, environment: Environment): URL | undefined {
  const variable = (name: string): string => environment[name] || environment[name.toLowerCase()] || "";
  const name = url.protocol === "https:" ? "HTTPS_PROXY" : "HTTP_PROXY";
  const value = variable(name) || variable("ALL_PROXY");
  if (value === "" || isExemptFromProxy(url, variable("NO_PROXY"))) return undefined;
  const withScheme = /^[a-z][a-z0-9+.-]*:\/\//i.test(value) ? value : `http://${value}`;
  const proxy = URL.canParse(withScheme) ? new URL(withScheme) : undefined;
  if (!proxy) throw new ImgpullError("PROXY", `${variable(name) ? name : "ALL_PROXY"} is not a URL`);
  if (proxy.protocol !== "http:" && proxy.protocol !== "https:") {
    throw new ImgpullError("PROXY", `a ${proxy.protocol}// proxy is not supported: only http:// and https:// ones are`);
  }
  return proxy;
}

function proxyHeaders(proxy: URL): Record<string, string> {
  if (proxy.username === "") return {};
  const credentials = `${decodeURIComponent(proxy.username)}:${decodeURIComponent(proxy.password)}`;
  return { "Proxy-Authorization": `Basic ${Buffer.from(credentials).toString("base64")}` };
}

/** An agent whose connections are TLS inside a CONNECT tunnel (RFC 9110 §9.3.6). */
function tunnelAgent(proxy: URL, options: https.AgentOptions, proxyTls: tls.ConnectionOptions, timeoutMs: number): https.Agent {
  const agent = new https.Agent(options);
  const name = `${proxy.protocol}//${proxy.host}`;
  type Callback = (error: Error | null, socket?: net.Socket) => void;
  const createConnection = (target: tls.ConnectionOptions, callback: Callback): undefined => {
    const authority = `${net.isIP(String(target.host)) === 6 ? `[${target.host}]` : target.host}:${target.port}`;
    const client = proxy.protocol === "https:" ? https : http;
    const connect = client.request(proxy, {
      ...proxyTls, method: "CONNECT", path: authority, agent: false, timeout: timeoutMs,
      headers: { Host: authority, ...proxyHeaders(proxy) },
    });
    connect.once("connect", (response, socket) => {
      if (response.statusCode === 200) {
        callback(null, tls.connect({ ...target, socket }));
        return;
      }
      socket.destroy();
      const remedy = response.statusCode === 407 ? "\n  it wants credentials: http://USER:PASSWORD@HOST:PORT" : "";
      callback(new ImgpullError("PROXY", `the proxy ${name} refused CONNECT ${authority}: ${response.statusCode} ` +
        `${printable(response.statusMessage ?? "")}${remedy}`, { status: response.statusCode }));
    });
    connect.once("timeout", () => connect.destroy(new ImgpullError("TIMEOUT", `the proxy ${name} is silent`)));
    connect.once("error", (error) => callback(connectionError(error, `the proxy ${name}`)));
    connect.end();
    return undefined;
  };
  return Object.assign(agent, { createConnection });
}

function createTransport(settings: TransportSettings): Transport {
  const contextFor = secureContexts(settings);
  const agents = new Map<string, Promise<http.Agent>>();
  const keepAlive = { keepAlive: true, scheduling: "lifo" as const };
  const verify = { rejectUnauthorized: !settings.insecure };

  const makeAgent = async (url: URL, isRegistry: boolean, proxy: URL | undefined): Promise<http.Agent> => {
    const proxyTls = proxy?.protocol === "https:" ? { secureContext: await contextFor(proxy, false) } : {};
    if (url.protocol === "http:") return proxy?.protocol === "https:" ? new https.Agent({ ...keepAlive, ...proxyTls }) : new http.Agent(keepAlive);
    const options = { ...keepAlive, ...verify, secureContext: await contextFor(url, isRegistry) };
    return proxy ? tunnelAgent(proxy, options, proxyTls, settings.timeoutMs) : new https.Agent(options);
  };

  const send = async (request: WireRequest): Promise<http.IncomingMessage> => {
    const { url, method, signal } = request;
    const doing = `${method} ${redactUrl(url)}`;
    const proxy = proxyFor(url, settings.environment);
    const key = `${url.protocol} ${request.isRegistry ? url.host : ""} ${proxy?.href ?? ""}`;
    const agent = agents.get(key) ?? makeAgent(url, request.isRegistry, proxy);
    agents.set(key, agent);
    const forwarded = proxy && url.protocol === "http:" ? proxy : undefined;
    const options: https.RequestOptions = {
      method, signal, agent: await agent, timeout: settings.timeoutMs,
      headers: { ...request.headers, ...(forwarded ? { Host: url.host, ...proxyHeaders(forwarded) } : {}) },
      ...(forwarded ? { path: url.href } : {}),
    };
    const client = (forwarded ?? url).protocol === "https:" ? https : http;
    return await new Promise((resolve, reject) => {
      const outgoing = client.request(forwarded ?? url, options);
      let incoming: http.IncomingMessage | undefined;
      outgoing.once("response", (response) => resolve((incoming = response)));
      outgoing.once("error", (error) => {
        const lost = outgoing.reusedSocket && errorCodeOf(error) === "ECONNRESET" && incoming === undefined;
        // A kept-alive connection that the server closed at the same moment: nothing was answered, so ask again.
        if (lost) resolve(send(request));
        else reject(connectionError(error, doing));
      });
      outgoing.on("timeout", () => {
        // Silence that we asked for (the disk or the reader is slower than the line) is not the server's.
        if (incoming?.isPaused()) outgoing.setTimeout(settings.timeoutMs);
        else {
          const silent = new ImgpullError("TIMEOUT", `${doing}: nothing came for ${settings.timeoutMs / 1000} s`);
          (incoming ?? outgoing).destroy(silent);
        }
      });
      outgoing.end(request.body);
    });
  };

  return {
    send,
    close: () => {
      for (const agent of agents.values()) void agent.then((ready) => ready.destroy(), () => undefined);
    },
  };
}

/** A whole body of at most `maximumBytes`; more is refused by name before it is held. */
async function readBody(response: http.IncomingMessage, maximumBytes: number, what: string): Promise<Buffer> {
  const tooLarge = (): ImgpullError => {
    response.destroy();
    return new ImgpullError("TOO_LARGE", `${what} is larger than ${maximumBytes} bytes`);
  };
  if (Number(response.headers["content-length"]) > maximumBytes) throw tooLarge();
  const chunks: Buffer[] = [];
  let length = 0;
  try {
    for await (const chunk of decodeBody(response, undefined)) {
      length += (chunk as Buffer).length;
      if (length > maximumBytes) throw tooLarge();
      chunks.push(chunk as Buffer);
    }
  } catch (error) {
    throw connectionError(error, what);
  }
  return Buffer.concat(chunks);
}

/**
 * Some front ends compress although `identity` was asked for. Others store a gzip layer with a Content-Encoding that
 * describes the layer itself: there the length gives it away, and the bytes are what was asked for.
 */
function decodeBody(response: http.IncomingMessage, expectedBytes: number | undefined): Readable {
  const encoding = response.headers["content-encoding"]?.toLowerCase();
  const length = response.headers["content-length"];
  if (expectedBytes !== undefined && Number(length) === expectedBytes) return response;
  const decoder = encoding === "gzip" || encoding === "x-gzip" ? zlib.createGunzip()
    : encoding === "deflate" ? zlib.createInflate()
    : encoding === "br" ? zlib.createBrotliDecompress()
    : undefined;
  if (!decoder) return response;
  response.once("error", (error) => decoder.destroy(error));
  decoder.once("close", () => response.destroy());
  return response.pipe(decoder);
}

/** What a server answered. A body is there on success only; otherwise its words were read, and the connection is free. */
interface Answer {
  readonly status: number;
  readonly headers: http.IncomingHttpHeaders;
  readonly url: URL;
  /** The Authorization header that this answer is for. */
  readonly authorization: string | undefined;
  readonly body?: http.IncomingMessage;
  readonly words: string;
}

interface Journey {
  readonly method: string;
  readonly start: URL;
  readonly headers: Readonly<Record<string, string>>;
  readonly body?: string;
  readonly authorizationFor: (origin: string) => Promise<string | undefined>;
  readonly isRegistry: (origin: string) => boolean;
  readonly signal: AbortSignal;
}

/** Follows redirects by hand: relative ones too, at most ten, never from https to http. */
async function followRedirects(transport: Transport, journey: Journey): Promise<Answer> {
  let url = journey.start;
  for (let hop = 0; ; hop += 1) {
    const authorization = await journey.authorizationFor(url.origin);
    const response = await transport.send({
      method: journey.method, url, signal: journey.signal, isRegistry: journey.isRegistry(url.origin),
      headers: {
        "User-Agent": `imgpull/${IMGPULL_VERSION}`, "Accept-Encoding": "identity", ...journey.headers,
        ...(authorization === undefined ? {} : { Authorization: authorization }),
      },
      ...(journey.body === undefined ? {} : { body: journey.body }),
    });
    const status = response.statusCode ?? 0;
    const common = { status, headers: response.headers, url, authorization };
    const location = response.headers.location;
    const isRedirect = [301, 302, 303, 307, 308].includes(status) && location !== undefined && journey.body === undefined;
    if (!isRedirect) {
      if (status >= 200 && status < 300) return { ...common, body: response, words: "" };
      return { ...common, words: await readWords(response) };
    }
    response.on("error", () => undefined).resume();
    const from = redactUrl(url);
    if (hop >= LIMITS.redirects) throw new ImgpullError("PROTOCOL", `${from}: more than ${LIMITS.redirects} redirects`);
    if (!URL.canParse(location, url)) throw new ImgpullError("PROTOCOL", `${from} redirects to what is not a URL`);
    const next = new URL(location, url);
    if (next.protocol !== "https:" && (next.protocol !== "http:" || url.protocol === "https:")) {
      throw new ImgpullError("PROTOCOL", `${from} redirects to ${redactUrl(next)}: not followed from https to ${next.protocol}`);
    }
    url = next;
  }
}

/** The registry's own words: `errors[].message` of the distribution specification, a token service's, or plain text. */
async function readWords(response: http.IncomingMessage): Promise<string> {
  const body = await readBody(response, LIMITS.errorBodyBytes, "the error's body").catch((error: unknown) => {
    if ((error as ImgpullError).code === "ABORTED") throw error;
    return Buffer.alloc(0);
  });
  const text = body.toString("utf8");
  try {
    const json = JSON.parse(text) as Record<string, unknown>;
    const errors = Array.isArray(json.errors) ? (json.errors as unknown[]) : [];
    const first = isRecord(errors[0]) ? errors[0] : {};
    const words = [first.code, first.message, json.details, json.message, json.error_description, json.error];
    return printable(words.filter((word) => typeof word === "string" && word !== "").slice(0, 2).join(": "));
  } catch {
    return /^\s*</.test(text) ? "" : printable(text);
  }
}

// ====== 7. Retry ======
// Pure but for the clock, which tests replace. Only known passing faults are retried; a bug never is. SPEC §6.

interface Clock {
  readonly now: () => number;
  readonly random: () => number;
  readonly sleep: (milliseconds: number, signal: AbortSignal) => Promise<void>;
}

const systemClock: Clock = {
  now: Date.now,
  random: Math.random,
  sleep: async (milliseconds, signal) => {
    await delay(milliseconds, undefined, { signal }).catch((error: unknown) => {
      throw connectionError(error, "waiting");
    });
  },
};

/** Retry-After is seconds or a date (RFC 9110 §10.2.3). */
function parseRetryAfter(value: string | undefined, now: number): number | undefined {
  if (value === undefined) return undefined;
  if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1000;
  const date = Date.parse(value);
  return Number.isNaN(date) ? undefined : Math.max(0, date - now);
}

function isRetriable(error: unknown): error is ImgpullError {
  if (!(error instanceof ImgpullError)) return false;
  if (error.code === "NETWORK") return errorCodeOf(error.cause) !== "ENOTFOUND"; // a name that does not exist is a typo
  if (error.code === "TIMEOUT" || error.code === "RATE_LIMITED" || error.retryAfterMs !== undefined) return true;
  const status = error.code === "PROTOCOL" || error.code === "PROXY" ? (error.status ?? 0) : 0;
  return status === 408 || status === 425 || (status >= 500 && status !== 501 && status !== 505);
}

/** How long to wait before the next attempt; undefined where there is none. `failures` counts those so far. */
function retryDelayMs(error: unknown, failures: number, retries: number, random: number): number | undefined {
  if (!isRetriable(error) || failures > retries) return undefined;
  if (error.retryAfterMs !== undefined && error.retryAfterMs > LIMITS.retryAfterMs) return undefined;
  const ceiling = Math.min(LIMITS.backoffMs, LIMITS.firstBackoffMs * 2 ** (failures - 1));
  return Math.max(error.retryAfterMs ?? 0, Math.round(ceiling * (0.5 + random / 2)));
}

/** Runs `attempt` until it succeeds. It returns whether the failed attempt got on: then the count starts anew. */
async function withRetries<T>(session: Session, signal: AbortSignal, attempt: () => Promise<T>, gotOn = () => false): Promise<T> {
  const { clock, settings } = session;
  for (let failures = 1; ; failures += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (signal.aborted) throw new ImgpullError("ABORTED", "stopped", { cause: error });
      if (gotOn()) failures = 1;
      const waitMs = retryDelayMs(error, failures, settings.retries, clock.random());
      if (waitMs === undefined) throw error;
      const said = (error as ImgpullError).message.split("\n")[0];
      session.warn(`${said}; trying again in ${(waitMs / 1000).toFixed(1)} s (${failures} of ${settings.retries})`);
      await clock.sleep(waitMs, signal);
    }
  }
}

// ====== 8. Credentials and tokens ======
// Challenges (RFC 9110 §11.6.1), the files of docker and podman, helpers, and the distribution token protocol. SPEC §6, §7.
// Invariant: a credential is for one registry; it goes there and to the token endpoint which that registry names.

interface Challenge {
  readonly scheme: string;
  readonly parameters: Readonly<Record<string, string>>;
}

/** Every challenge of every header line: commas separate both parameters and challenges, and may be inside quotes. */
function parseChallenges(lines: readonly string[]): Challenge[] {
  const challenges: { scheme: string; parameters: Record<string, string> }[] = [];
  for (const line of lines) {
    const token = /\s*,*\s*([!#$%&'*+.^_`|~0-9A-Za-z/-]+=*)(?:\s*=\s*("(?:[^"\\]|\\.)*"?|[^\s,"]*))?/y;
    let current: { scheme: string; parameters: Record<string, string> } | undefined;
    for (let match = token.exec(line); match !== null && match[0].trim() !== ""; match = token.exec(line)) {
      const [, name = "", value] = match;
      if (value !== undefined && current) {
        const unquoted = value.startsWith('"') ? value.replace(/^"|"$/g, "").replace(/\\(.)/g, "$1") : value;
        current.parameters[name.toLowerCase()] ??= unquoted;
      } else {
        const isToken68 = current !== undefined && Object.keys(current.parameters).length === 0 && name.endsWith("=");
        if (!isToken68) challenges.push((current = { scheme: name.toLowerCase(), parameters: {} }));
      }
    }
  }
  return challenges;
}

/** `stored` ones come from a file or a helper: where they are refused, a public image can still be pulled. */
interface Credential {
  readonly kind: "basic" | "identity" | "bearer" | "outside";
  readonly username: string;
  readonly secret: string;
  readonly source: string;
  readonly stored: boolean;
}

const HUB_KEY = "https://index.docker.io/v1/";

/** A credential file's key as host[/path]: docker writes URLs with /v1/, podman writes paths. */
function normalizeAuthKey(key: string): string {
  const bare = key.replace(/^https?:\/\//, "").replace(/\/(v1|v2)?\/?$/, "");
  const [host = "", ...rest] = bare.split("/");
  return [DOCKER_HUB_HOSTS.includes(host) ? "docker.io" : host, ...rest].join("/");
}

function decodeAuthEntry(entry: Record<string, unknown>, source: string): Credential | undefined {
  const text = (name: string): string => (typeof entry[name] === "string" ? entry[name] : "");
  const decoded = text("auth") === "" ? "" : Buffer.from(text("auth"), "base64").toString("utf8").replace(/\0+$/, "");
  const colon = decoded.indexOf(":");
  if (text("auth") !== "" && colon < 0) throw new ImgpullError("CREDENTIALS", `${source}: its "auth" is not USER:PASSWORD in base64`);
  const username = colon < 0 ? text("username") : decoded.slice(0, colon);
  const password = colon < 0 ? text("password") : decoded.slice(colon + 1);
  const make = (kind: Credential["kind"], secret: string): Credential => ({ kind, username, secret, source, stored: true });
  if (text("identitytoken") !== "") return make("identity", text("identitytoken"));
  if (text("registrytoken") !== "") return make("bearer", text("registrytoken"));
  return username === "" && password === "" ? undefined : make("basic", password);
}

/** docker-credential-NAME: the server on stdin, JSON on stdout (docker/docker-credential-helpers). */
async function runCredentialHelper(session: Session, name: string, server: string): Promise<Credential | undefined> {
  const program = `docker-credential-${name}`;
  const refuse = (reason: string, cause?: unknown): ImgpullError =>
    new ImgpullError("CREDENTIALS", `the credential helper ${printable(program)} ${reason}`, { cause });
  if (!/^[\w.+-]+$/.test(name)) throw refuse("has a name that is not one");
  const { exitCode, stdout, stderr } = await new Promise<{ exitCode: number | null; stdout: string; stderr: string }>(
    (resolve, reject) => {
      const child = spawn(program, ["get"], { signal: session.signal, stdio: ["pipe", "pipe", "pipe"], timeout: 60_000 });
      const output = { stdout: "", stderr: "" };
      for (const stream of ["stdout", "stderr"] as const) {
        child[stream].setEncoding("utf8").on("data", (text: string) => {
          if (output[stream].length < LIMITS.tokenBytes) output[stream] += text;
        });
      }
      child.once("error", reject);
      child.once("close", (code) => resolve({ exitCode: code, ...output }));
      child.stdin.on("error", () => undefined).end(server);
    },
  ).catch((error: unknown) => {
    if (session.signal.aborted) throw new ImgpullError("ABORTED", "stopped", { cause: error });
    throw refuse(`cannot be run: ${errorCodeOf(error) === "ENOENT" ? "it is not on the PATH" : errorCodeOf(error)}`, error);
  });
  if (exitCode !== 0) {
    const words = printable(stdout || stderr);
    if (/credentials not found|no credentials|could not be found|not found in/i.test(words)) return undefined;
    throw refuse(`failed: ${words || `exit code ${exitCode}`}`);
  }
  let answer: unknown;
  try {
    answer = JSON.parse(stdout);
  } catch {
    throw refuse("answered what is not JSON"); // no cause: JSON.parse quotes the text, which is a secret
  }
  if (!isRecord(answer) || typeof answer.Secret !== "string") throw refuse("answered without a Secret");
  const username = typeof answer.Username === "string" ? answer.Username : "";
  if (username === "" && answer.Secret === "") return undefined;
  const kind = username === "<token>" ? "identity" : "basic";
  return { kind, username: kind === "identity" ? "" : username, secret: answer.Secret, source: program, stored: true };
}

/** The credential that one file has for a repository: its helper, its store, or the longest path in `auths`. */
async function credentialInFile(session: Session, text: string, source: string, reference: Reference): Promise<Credential | undefined> {
  let file: unknown;
  try {
    file = JSON.parse(text);
  } catch {
    throw new ImgpullError("CREDENTIALS", `${source} is not JSON`);
  }
  if (!isRecord(file)) throw new ImgpullError("CREDENTIALS", `${source} is not a JSON object`);
  const server = reference.host === "docker.io" ? HUB_KEY : reference.host;
  const helpers = isRecord(file.credHelpers) ? file.credHelpers : {};
  const wanted = `${reference.host}/${reference.repository}`;
  const bestOf = (keys: string[]): string | undefined =>
    keys.filter((key) => `${wanted}/`.startsWith(`${normalizeAuthKey(key)}/`))
      .sort((left, right) => normalizeAuthKey(right).length - normalizeAuthKey(left).length)[0];
  const helperKey = bestOf(Object.keys(helpers));
  const helper = helperKey === undefined ? file.credsStore : helpers[helperKey];
  if (typeof helper === "string" && helper !== "") {
    const found = await runCredentialHelper(session, helper, server);
    if (found) return found;
  }
  const auths = isRecord(file.auths) ? file.auths : {};
  const authKey = bestOf(Object.keys(auths).filter((key) => isRecord(auths[key]) && Object.keys(auths[key]).length > 0));
  return authKey === undefined ? undefined : decodeAuthEntry(auths[authKey] as Record<string, unknown>, source);
}

/** SPEC §7's order. Every place is tried, and the first that knows the registry is taken. */
async function findCredential(session: Session, reference: Reference): Promise<Credential | undefined> {
  const { settings, environment } = session;
  const given = { source: "--user and --password", stored: false };
  if (settings.token !== undefined) return { kind: "outside", username: "", secret: settings.token, source: "--token", stored: false };
  if (settings.username !== undefined) {
    return { kind: "basic", username: settings.username, secret: settings.password ?? "", ...given };
  }
  const home = environment.HOME ?? os.homedir();
  const named = environment.REGISTRY_AUTH_FILE;
  const places: [string, string | undefined][] = [
    ["DOCKER_AUTH_CONFIG", environment.DOCKER_AUTH_CONFIG],
    [path.join(environment.DOCKER_CONFIG || path.join(home, ".docker"), "config.json"), undefined],
    ...(environment.XDG_RUNTIME_DIR
      ? [[path.join(environment.XDG_RUNTIME_DIR, "containers/auth.json"), undefined] as [string, undefined]] : []),
    [path.join(home, ".config/containers/auth.json"), undefined],
  ];
  if (named) places.unshift([named, undefined]);
  for (const [source, inline] of places) {
    const isVariable = source === "DOCKER_AUTH_CONFIG";
    const text = isVariable ? inline : await readCredentialFile(source, source === named);
    if (!text) continue;
    const found = await credentialInFile(session, text, source, reference);
    if (found) return found;
  }
  return undefined;
}

async function readCredentialFile(file: string, isRequired: boolean): Promise<string | undefined> {
  try {
    const { size } = await fs.stat(file);
    if (size > LIMITS.credentialFileBytes) throw new ImgpullError("CREDENTIALS", `${file} is larger than a credential file`);
    return await fs.readFile(file, "utf8");
  } catch (error) {
    const code = errorCodeOf(error);
    if (!isRequired && (code === "ENOENT" || code === "ENOTDIR" || code === "ERR_ACCESS_DENIED")) return undefined;
    if (error instanceof ImgpullError) throw error;
    const name = isRequired ? `REGISTRY_AUTH_FILE names ${file}` : `the credential file ${file}`;
    throw new ImgpullError("CREDENTIALS", `${name}: ${DISK_WORDS[code] ?? code}`, { cause: error });
  }
}

function basicAuthorization(credential: Credential): string {
  return `Basic ${Buffer.from(`${credential.username}:${credential.secret}`, "utf8").toString("base64")}`;
}

interface Authorization {
  readonly header: string | undefined;
  readonly expiresAt: number;
}

/** A token for one repository (distribution specification, "Token Authentication"; OAuth2 for identity tokens). */
async function fetchToken(session: Session, origin: string, scope: string, challenge: Challenge, credential: Credential | undefined): Promise<Authorization> {
  const { realm = "", service } = challenge.parameters;
  if (realm === "" || !URL.canParse(realm, `${origin}/`)) {
    throw new ImgpullError("PROTOCOL", `${origin} asks for a token without saying where (no usable realm)`);
  }
  const url = new URL(realm, `${origin}/`);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && origin.startsWith("http:"))) {
    throw new ImgpullError("PROTOCOL", `${origin} names the token endpoint ${redactUrl(url)}: not over ${url.protocol}`);
  }
  const ask = async (method: string, start: URL, authorization?: string, body?: string): Promise<Answer> =>
    await followRedirects(session.transport, {
      method, start, signal: session.signal,
      headers: body === undefined ? {} : { "Content-Type": "application/x-www-form-urlencoded" },
      ...(body === undefined ? {} : { body }),
      authorizationFor: async (target) => (target === start.origin ? authorization : undefined),
      isRegistry: (target) => target === origin,
    });
  let answer: Answer | undefined;
  if (credential?.kind === "identity") {
    const form = new URLSearchParams({
      grant_type: "refresh_token", ...(service ? { service } : {}), scope, client_id: "imgpull", refresh_token: credential.secret,
    });
    answer = await ask("POST", url, undefined, form.toString());
    if ([400, 401, 404, 405].includes(answer.status) || (answer.status >= 300 && answer.status < 400)) answer = undefined;
  }
  if (!answer) {
    const query = new URL(url);
    if (service) query.searchParams.set("service", service);
    query.searchParams.set("scope", scope);
    const username = credential?.username || "00000000-0000-0000-0000-000000000000"; // what ACR takes with its own tokens
    answer = await ask("GET", query, credential && basicAuthorization({ ...credential, username }));
  }
  if (!answer.body) throw statusError(answer, session.clock.now(), "the token service");
  const text = (await readBody(answer.body, LIMITS.tokenBytes, `the token of ${redactUrl(url)}`)).toString("utf8");
  let token: unknown;
  let expiresIn: unknown;
  try {
    const json = JSON.parse(text) as Record<string, unknown>;
    token = json.token || json.access_token;
    expiresIn = json.expires_in;
  } catch {
    token = undefined;
  }
  if (typeof token !== "string" || !/^[\x21-\x7e]+$/.test(token)) {
    throw new ImgpullError("PROTOCOL", `${redactUrl(url)} answered without a token`);
  }
  const lifeMs = Math.max(LIMITS.tokenFloorMs, typeof expiresIn === "number" ? expiresIn * 1000 : 0);
  return { header: `Bearer ${token}`, expiresAt: session.clock.now() + lifeMs };
}

/** What a status means, with the registry's words. */
function statusError(answer: Answer, now: number, who = "the registry", isRegistry = true): ImgpullError {
  const { status } = answer;
  const retryAfterMs = parseRetryAfter(answer.headers["retry-after"] as string | undefined, now);
  const said = `${redactUrl(answer.url)}: ${who} answered ${status}${answer.words ? ` (${answer.words})` : ""}`;
  if (status === 429) {
    const when = retryAfterMs === undefined ? "try again later"
      : `come back in ${Math.ceil(retryAfterMs / 1000)} s, at ${new Date(now + Math.min(retryAfterMs, 1e12)).toISOString()}`;
    return new ImgpullError("RATE_LIMITED", `${said}\n  too many requests: ${when}`, { status, retryAfterMs });
  }
  // A storage host's refusal is a signed URL that has expired: asking the registry again gives a new one.
  const isExpired = !isRegistry && [400, 401, 403].includes(status);
  const code = status === 401 ? "UNAUTHORIZED" : status === 403 ? "FORBIDDEN" : status === 404 ? "NOT_FOUND" : "PROTOCOL";
  const plainOnTls = /HTTP request (was sent )?to (an )?HTTPS/i.test(answer.words) ? "\n  try without --scheme http" : "";
  return new ImgpullError(code, said + plainOnTls, { status, retryAfterMs: isExpired ? 0 : status >= 500 ? retryAfterMs : undefined });
}

// ====== 9. Registry ======
// One repository of one registry: manifests and blobs from an offset, with whatever handshake it wants. SPEC §6.

interface Settings extends TransportSettings {
  readonly scheme: "https" | "http";
  readonly wanted: { readonly os?: string; readonly architecture?: string; readonly variant?: string };
  readonly username?: string;
  readonly password?: string;
  readonly token?: string;
  readonly namespace?: string;
  readonly concurrency: number;
  readonly retries: number;
}

/** What everything that a pull does has in common. Two pulls share nothing. */
interface Session {
  readonly settings: Settings;
  readonly transport: Transport;
  readonly clock: Clock;
  readonly environment: Environment;
  readonly signal: AbortSignal;
  /** What each origin asked for: the next repository there need not be refused first. */
  readonly challenges: Map<string, readonly Challenge[]>;
  readonly credentials: Map<string, Promise<Credential | undefined>>;
  readonly warn: (message: string) => void;
}

interface FetchedManifest {
  readonly mediaType: string;
  readonly digest: string;
  readonly bytes: Buffer;
}

class Registry {
  readonly origin: string;
  readonly reference: Reference;
  /** False once it has answered a range with the whole. */
  acceptsRanges = true;
  /** The quickest answer so far: how far away it is. */
  latencyMs = Number.POSITIVE_INFINITY;
  readonly #session: Session;
  readonly #held = new Map<string, Authorization>();
  readonly #renewals = new Map<string, Promise<boolean>>();
  #isAnonymous = false;

  constructor(session: Session, reference: Reference) {
    this.#session = session;
    this.reference = reference;
    this.origin = new URL(`${session.settings.scheme}://${apiHost(reference.host)}`).origin;
    if (session.settings.token !== undefined) {
      const header = `Basic ${session.settings.token}`;
      this.#held.set(this.origin, { header, expiresAt: Number.POSITIVE_INFINITY });
    }
  }

  url(rest: string): URL {
    const url = new URL(`${this.origin}/v2/${this.reference.repository}/${rest}`);
    if (this.#session.settings.namespace !== undefined) url.searchParams.set("ns", this.#session.settings.namespace);
    return url;
  }

  async #credential(): Promise<Credential | undefined> {
    if (this.#isAnonymous) return undefined;
    const key = `${this.reference.host}/${this.reference.repository}`;
    const found = this.#session.credentials.get(key) ?? findCredential(this.#session, this.reference);
    this.#session.credentials.set(key, found);
    return await found;
  }

  /** One answer to one request, after at most one handshake and one renewal or fallback. */
  async request(method: string, start: URL, headers: Record<string, string>, signal: AbortSignal): Promise<Answer> {
    for (let round = 0; ; round += 1) {
      const answer = await followRedirects(this.#session.transport, {
        method, start, headers, signal,
        authorizationFor: async (origin) => await this.#authorizationFor(origin),
        isRegistry: (origin) => origin === this.origin,
      });
      const { status, authorization: sent } = answer;
      // ECR Public answers a stale token with 400, GHCR a stale credential for a public image with 403.
      const mayBeStale = status === 401 || (status === 400 && sent?.startsWith("Bearer ") === true) || (status === 403 && sent !== undefined);
      if (!mayBeStale || round === 3 || !(await this.#authorize(answer, round))) return answer;
    }
  }

  async #authorizationFor(origin: string): Promise<string | undefined> {
    const held = this.#held.get(origin);
    if (held && held.expiresAt > this.#session.clock.now()) return held.header;
    const challenges = this.#session.challenges.get(origin);
    const isTokenAsked = challenges?.some((challenge) => challenge.scheme === "bearer") === true;
    if (challenges && isTokenAsked) await this.#once(origin, async () => await this.#handshake(origin, challenges));
    return this.#held.get(origin)?.header;
  }

  /** Connections that are refused at the same time get one new token between them. */
  async #once(origin: string, renew: () => Promise<boolean>): Promise<boolean> {
    const running = this.#renewals.get(origin) ?? renew().finally(() => this.#renewals.delete(origin));
    this.#renewals.set(origin, running);
    return await running;
  }

  /** Whether another attempt may go better than the one that got `answer`. */
  async #authorize(answer: Answer, round: number): Promise<boolean> {
    const { origin } = answer.url;
    const { authorization: sent, status } = answer;
    if (this.#held.get(origin)?.header !== sent) return true; // another connection has renewed it meanwhile
    const header = answer.headers["www-authenticate"] as string | string[] | undefined;
    const challenges = parseChallenges([header ?? []].flat());
    if (challenges.length > 0) this.#session.challenges.set(origin, challenges);
    const known = challenges.length > 0 ? challenges : (this.#session.challenges.get(origin) ?? []);
    const credential = origin === this.origin ? await this.#credential() : undefined;
    if (credential?.kind === "outside") return false;
    const isRefused = status === 403 || (round > 0 && sent !== undefined) || (sent?.startsWith("Basic ") ?? false);
    if (isRefused) {
      if (!credential?.stored) return false;
      this.#giveUp(credential, `${redactUrl(answer.url)}: ${status}`);
    }
    return await this.#once(origin, async () => await this.#handshake(origin, known));
  }

  #giveUp(credential: Credential, reason: string): void {
    this.#isAnonymous = true;
    this.#held.delete(this.origin);
    this.#session.warn(`the credentials of ${credential.source} were refused (${reason}); trying without any`);
  }

  async #handshake(origin: string, challenges: readonly Challenge[]): Promise<boolean> {
    const credential = origin === this.origin ? await this.#credential() : undefined;
    const never = Number.POSITIVE_INFINITY;
    const bearer = challenges.find((challenge) => challenge.scheme === "bearer");
    if (bearer && credential?.kind === "bearer") {
      this.#held.set(origin, { header: `Bearer ${credential.secret}`, expiresAt: never });
      return true;
    }
    if (bearer) {
      const scope = `repository:${this.reference.repository}:pull`;
      try {
        this.#held.set(origin, await fetchToken(this.#session, origin, scope, bearer, credential));
      } catch (error) {
        const status = error instanceof ImgpullError ? (error.status ?? 0) : 0;
        if (!credential || ![400, 401, 403, 404].includes(status)) throw error;
        if (!credential.stored) {
          throw new ImgpullError("UNAUTHORIZED", `${(error as Error).message}\n  refused: ${credential.source}`, { status, cause: error });
        }
        this.#giveUp(credential, (error as Error).message);
        this.#held.set(origin, await fetchToken(this.#session, origin, scope, bearer, undefined));
      }
      return true;
    }
    const isBasic = challenges.some((challenge) => challenge.scheme === "basic");
    if (isBasic && credential?.kind === "basic") {
      this.#held.set(origin, { header: basicAuthorization(credential), expiresAt: never });
      return true;
    }
    return this.#isAnonymous && !isBasic;
  }

  /** A refusal in the user's terms: what was asked for, and which credentials were tried. */
  async #refusal(answer: Answer, what: string): Promise<ImgpullError> {
    const isRegistry = answer.url.origin === this.origin;
    const error = statusError(answer, this.#session.clock.now(), isRegistry ? "the registry" : "the storage host", isRegistry);
    if (error.code === "NOT_FOUND") {
      const isRepository = /NAME_UNKNOWN|repository name not known/i.test(answer.words);
      const missing = isRepository ? `no such repository: ${this.reference.host}/${this.reference.repository}` : `no such ${what}`;
      return new ImgpullError("NOT_FOUND", `${missing}\n  ${error.message}`, { status: answer.status });
    }
    if (error.code !== "UNAUTHORIZED" && error.code !== "FORBIDDEN") return error;
    if (error.retryAfterMs !== undefined) return error;
    const credential = await this.#credential();
    const tried = this.#isAnonymous ? "the stored credentials were refused, and so was a request without any"
      : credential ? `tried the credentials of ${credential.source}`
      : "no credentials were found for this registry (--user, --token, or docker login)";
    const maybe = credential ? "" : "; a repository that does not exist is often answered the same way";
    return new ImgpullError(error.code, `${error.message}\n  ${tried}${maybe}`, { status: answer.status });
  }

  /** The manifest of a tag or digest, verified against the digest where one was asked for. */
  async manifest(tagOrDigest: string): Promise<FetchedManifest> {
    const url = this.url(`manifests/${tagOrDigest}`);
    const what = isDigest(tagOrDigest) ? `manifest: ${tagOrDigest}` : `tag: ${formatReference({ ...this.reference, tag: tagOrDigest })}`;
    return await withRetries(this.#session, this.#session.signal, async () => {
      const startedAt = performance.now();
      const answer = await this.request("GET", url, { Accept: MANIFEST_TYPES.join(", ") }, this.#session.signal);
      if (!answer.body) throw await this.#refusal(answer, what);
      this.latencyMs = Math.min(this.latencyMs, performance.now() - startedAt);
      const bytes = await readBody(answer.body, LIMITS.manifestBytes, `the manifest ${redactUrl(url)}`);
      const digest = digestOf(bytes, isDigest(tagOrDigest) ? tagOrDigest : undefined);
      if (isDigest(tagOrDigest) && digest !== tagOrDigest) {
        throw new ImgpullError("DIGEST_MISMATCH", `${redactUrl(url)}: the manifest's bytes have the digest ${digest}`);
      }
      return { mediaType: sniffMediaType(bytes, answer, this.reference.host), digest, bytes };
    });
  }

  async head(tagOrDigest: string): Promise<{ mediaType: string; digest: string; size: number } | undefined> {
    const url = this.url(`manifests/${tagOrDigest}`);
    return await withRetries(this.#session, this.#session.signal, async () => {
      const answer = await this.request("HEAD", url, { Accept: MANIFEST_TYPES.join(", ") }, this.#session.signal);
      if (!answer.body) throw await this.#refusal(answer, `tag: ${formatReference(this.reference)}`);
      answer.body.resume();
      const digest = answer.headers["docker-content-digest"];
      const length = answer.headers["content-length"];
      const mediaType = (answer.headers["content-type"] ?? "").split(";")[0]?.trim() ?? "";
      const isWhole = isDigest(digest) && length !== undefined && MANIFEST_TYPES.includes(mediaType);
      return isWhole ? { mediaType, digest, size: Number(length) } : undefined;
    });
  }

  /** One answer with a blob's bytes from `from` up to, not including, `to`. The caller checks what came. */
  async blob(descriptor: Descriptor, from: number, to: number, signal: AbortSignal): Promise<Answer> {
    const isWhole = from === 0 && to === descriptor.size;
    const headers: Record<string, string> = isWhole ? {} : { Range: `bytes=${from}-${to - 1}` };
    const answer = await this.request("GET", this.url(`blobs/${descriptor.digest}`), headers, signal);
    if (answer.body) return answer;
    if (answer.status !== 404 || descriptor.urls === undefined) throw await this.#refusal(answer, `blob: ${descriptor.digest}`);
    let refusal = answer;
    for (const text of descriptor.urls) {
      const url = URL.canParse(text) ? new URL(text) : undefined;
      if (url?.protocol !== "https:") continue;
      refusal = await followRedirects(this.#session.transport, {
        method: "GET", start: url, headers, signal, authorizationFor: async () => undefined, isRegistry: () => false,
      });
      if (refusal.body) return refusal;
    }
    throw statusError(refusal, this.#session.clock.now(), "the foreign layer's host");
  }
}

/** The media type by the JSON itself, then by the header: registries label manifests text/plain and worse. */
function sniffMediaType(bytes: Buffer, answer: Answer, host: string): string {
  const header = (answer.headers["content-type"] ?? "").split(";")[0]?.trim().toLowerCase() ?? "";
  const refuse = (): never => {
    throw new ImgpullError("PROTOCOL", `${redactUrl(answer.url)}: the answer is not a manifest` +
      `${header ? ` but ${printable(header)}` : ""}: is ${host} a registry?`, { status: answer.status });
  };
  let json: unknown;
  try {
    json = JSON.parse(bytes.toString("utf8"));
  } catch {
    refuse();
  }
  if (!isRecord(json)) return refuse();
  if (typeof json.mediaType === "string") return json.mediaType;
  if (MANIFEST_TYPES.includes(header)) return header;
  if (json.schemaVersion === 1) return "application/vnd.docker.distribution.manifest.v1+json";
  if (Array.isArray(json.manifests)) return OCI_INDEX;
  return isRecord(json.config) ? OCI_MANIFEST : refuse();
}

// ====== 10. Manifests and platforms ======
// One shape for Docker and OCI. Everything that a registry says of digests and sizes is checked here. SPEC §3.

interface ImageManifest {
  readonly kind: "image";
  readonly config: Descriptor;
  readonly layers: readonly Descriptor[];
}

interface IndexManifest {
  readonly kind: "index";
  readonly manifests: readonly Descriptor[];
}

function parseDescriptor(value: unknown, where: string): Descriptor {
  const refuse = (reason: string): never => {
    throw new ImgpullError("PROTOCOL", `${where}: ${reason}`);
  };
  if (!isRecord(value)) return refuse("a descriptor is not an object");
  const { mediaType, digest, size, urls, platform } = value;
  if (!isDigest(digest)) return refuse(`"${printable(String(digest), 100)}" is not a digest that is safe to use`);
  if (typeof size !== "number" || !Number.isSafeInteger(size) || size < 0) {
    return refuse(`${digest} has the size ${printable(JSON.stringify(size) ?? "none", 40)}, which is not a number of bytes`);
  }
  const isUrlList = Array.isArray(urls) && urls.every((url) => typeof url === "string");
  return {
    mediaType: typeof mediaType === "string" ? mediaType : "",
    digest,
    size,
    ...(isUrlList && urls.length > 0 ? { urls: urls as string[] } : {}),
    ...(isRecord(platform) ? { platform: parsePlatform(platform) } : {}),
  };
}

function parsePlatform(value: Record<string, unknown>): Platform {
  const word = (name: string): string => (typeof value[name] === "string" ? printable(value[name], 64) : "");
  const variant = word("variant");
  return { os: word("os"), architecture: word("architecture"), ...(variant ? { variant } : {}) };
}

function parseManifest(fetched: FetchedManifest, where: string): ImageManifest | IndexManifest {
  const json: unknown = JSON.parse(fetched.bytes.toString("utf8"));
  const { mediaType } = fetched;
  if (!isRecord(json)) throw new ImgpullError("PROTOCOL", `${where}: the manifest is not a JSON object`);
  if (json.schemaVersion === 1 || mediaType.startsWith("application/vnd.docker.distribution.manifest.v1")) {
    throw new ImgpullError("UNSUPPORTED", `${where}: a schema 1 manifest; Docker itself has given that format up. Push the image anew`);
  }
  if (mediaType === "application/vnd.oci.artifact.manifest.v1+json") {
    throw new ImgpullError("UNSUPPORTED", `${where}: an OCI artifact manifest, a draft that the specification has withdrawn`);
  }
  const isIndex = Array.isArray(json.manifests);
  const isImage = isRecord(json.config) && Array.isArray(json.layers);
  const saysIndex = mediaType === OCI_INDEX || mediaType === DOCKER_INDEX;
  // One document read as two things by two readers is an attack (CVE-2021-41190).
  if (isIndex === isImage || (isIndex && Array.isArray(json.layers)) || (isIndex !== saysIndex && MANIFEST_TYPES.includes(mediaType))) {
    throw new ImgpullError("PROTOCOL", `${where}: ${printable(mediaType, 100)} with the fields of something else`);
  }
  if (isIndex) {
    const manifests = json.manifests as unknown[];
    if (manifests.length > LIMITS.indexEntries) {
      throw new ImgpullError("TOO_LARGE", `${where}: an index of more than ${LIMITS.indexEntries} entries`);
    }
    return { kind: "index", manifests: manifests.map((entry) => parseDescriptor(entry, where)) };
  }
  const config = parseDescriptor(json.config, where);
  if (config.size > LIMITS.configBytes) {
    throw new ImgpullError("TOO_LARGE", `${where}: its config of ${config.size} bytes is larger than ${LIMITS.configBytes}`);
  }
  return { kind: "image", config, layers: (json.layers as unknown[]).map((layer) => parseDescriptor(layer, where)) };
}

/** This machine, in Go's words. */
function hostPlatform(): Platform {
  const systems: Record<string, string> = { win32: "windows", sunos: "solaris" };
  const processors: Record<string, string> = { x64: "amd64", ia32: "386", mipsel: "mipsle" };
  const littlePower = process.arch === "ppc64" && os.endianness() === "LE" ? "ppc64le" : undefined;
  const variables = process.config.variables as unknown as Record<string, unknown>;
  const armVersion = process.arch === "arm" ? String(variables.arm_version ?? "7") : undefined;
  return {
    os: systems[process.platform] ?? process.platform,
    architecture: littlePower ?? processors[process.arch] ?? process.arch,
    ...(armVersion === undefined ? {} : { variant: `v${armVersion}` }),
  };
}

/** Variants that serve, best first; "" is an entry without one. containerd's platforms package has the same order. */
function acceptableVariants(architecture: string, variant: string | undefined): string[] {
  const downFrom = (highest: number, lowest: number): string[] =>
    Array.from({ length: Math.max(0, highest - lowest + 1) }, (_, index) => `v${highest - index}`);
  const level = /^v(\d{1,2})$/.exec(variant ?? "")?.[1];
  if (architecture === "arm") {
    if (variant === undefined) return ["", ...downFrom(7, 5)];
    // A plain arm entry is v7 by convention.
    return level === undefined ? [variant] : downFrom(Number(level), 5).flatMap((each) => (each === "v7" ? [each, ""] : [each]));
  }
  const base = architecture === "arm64" ? 8 : 1;
  if (architecture === "arm64" || architecture === "amd64") {
    if (variant === undefined) return ["", `v${base}`];
    return level === undefined ? [variant] : [...downFrom(Number(level), base), ""];
  }
  return variant === undefined ? ["", "*"] : [variant];
}

function matchPlatform(candidates: readonly Descriptor[], wanted: Platform): Descriptor | undefined {
  const fitting = candidates.filter(
    ({ platform }) => platform?.os === wanted.os && platform.architecture === wanted.architecture,
  );
  for (const variant of acceptableVariants(wanted.architecture, wanted.variant)) {
    const found = fitting.find(({ platform }) => variant === "*" || (platform?.variant ?? "") === variant);
    if (found) return found;
  }
  return undefined;
}

/** Attestations (BuildKit) are entries for a platform that does not exist. */
function isAttestation(entry: Descriptor): boolean {
  return entry.platform?.os === "unknown" || entry.platform?.architecture === "unknown";
}

function isIndexType(mediaType: string): boolean {
  return mediaType === OCI_INDEX || mediaType === DOCKER_INDEX;
}

/** The platform to look for: what was asked, the rest from this machine (whose variant goes with its processor). */
function wantedPlatform(wanted: Settings["wanted"], host = hostPlatform()): Platform {
  const variant = wanted.variant ?? (wanted.architecture === undefined ? host.variant : undefined);
  return {
    os: wanted.os ?? host.os,
    architecture: wanted.architecture ?? host.architecture,
    ...(variant === undefined ? {} : { variant }),
  };
}

// ====== 11. Tar ======
// POSIX pax: a pure header encoder, the plan of a whole tar before its first byte, and a reader for tars that exist. SPEC §4.
// Invariant: the same digests give the same plan, and the plan gives the same bytes, on every machine.

const BLOCK = 512;

function paddingOf(sizeBytes: number): number {
  return (BLOCK - (sizeBytes % BLOCK)) % BLOCK;
}

/** The ustar header of a regular file, its fields in order; name and size must fit. */
function encodeUstarHeader(name: string, sizeBytes: number, type: "0" | "x"): Buffer {
  const octal = (value: number, width: number): string => `${value.toString(8).padStart(width - 1, "0")}\0`;
  const fields: [width: number, text: string][] = [
    [100, name], [8, octal(0o644, 8)], [8, octal(0, 8)], [8, octal(0, 8)], [12, octal(sizeBytes, 12)], [12, octal(0, 12)],
    [8, " ".repeat(8)], [1, type], [100, ""], [6, "ustar\0"], [2, "00"], [32, ""], [32, ""], [8, octal(0, 8)],
    [8, octal(0, 8)], [155, ""], [12, ""],
  ];
  const header = Buffer.concat(fields.map(([width, text]) => Buffer.concat([Buffer.from(text, "latin1")], width)));
  const checksum = header.reduce((sum, byte) => sum + byte, 0);
  header.write(`${checksum.toString(8).padStart(6, "0")}\0 `, 148, "latin1");
  return header;
}

/** Header of an entry; names above 100 bytes and sizes from 8 GiB need a pax extended header before it. */
function encodeTarHeader(name: string, sizeBytes: number): Buffer {
  const record = (key: string, value: string): string => {
    const rest = ` ${key}=${value}\n`;
    let length = rest.length;
    while (`${length}`.length + rest.length !== length) length = `${length}`.length + rest.length; // it counts itself
    return `${length}${rest}`;
  };
  const isLong = name.length > 100;
  const isLarge = sizeBytes > 0o77777777777;
  const plain = encodeUstarHeader(name.slice(0, 100), isLarge ? 0 : sizeBytes, "0");
  if (!isLong && !isLarge) return plain;
  const records = (isLong ? record("path", name) : "") + (isLarge ? record("size", String(sizeBytes)) : "");
  const padded = Buffer.concat([Buffer.from(records, "latin1")], records.length + paddingOf(records.length));
  return Buffer.concat([encodeUstarHeader("PaxHeaders/blob", records.length, "x"), padded, plain]);
}

/** What one reference came to: the manifests to keep, and the images among them. */
interface ResolvedImage {
  readonly reference: Reference;
  readonly name: string;
  readonly registry: Registry;
  /** What index.json points at. */
  readonly top: FetchedManifest;
  readonly manifests: readonly FetchedManifest[];
  readonly contents: readonly ImageContent[];
  readonly platform: string;
}

interface ImageContent {
  readonly digest: string;
  readonly manifest: ImageManifest;
  readonly platform?: Platform;
  /** Read already where the platform had to be looked up in it. */
  readonly configBytes?: Buffer;
}

/** One file of the tar or directory. Its content is `bytes`, or a blob that `registry` has. */
interface PlanEntry {
  readonly name: string;
  readonly sizeBytes: number;
  /** Padding of the entry before, and this one's header. */
  readonly lead: Buffer;
  /** Where the content begins in the tar. */
  readonly offset: number;
  readonly bytes?: Buffer;
  readonly blob?: { readonly descriptor: Descriptor; readonly registry: Registry };
}

/** Everything that will be in DEST, known before a byte of a layer: the tar, the stream, the directory read the same. */
interface Plan {
  readonly entries: readonly PlanEntry[];
  readonly trailer: Buffer;
  readonly sizeBytes: number;
  readonly blobBytes: number;
  /** Digest of all that is known: two plans with the same id put the same bytes at the same offsets. */
  readonly id: string;
  readonly omitted: readonly Descriptor[];
}

function isImage(content: ImageContent): boolean {
  return IMAGE_CONFIG_TYPES.includes(content.manifest.config.mediaType);
}

/** index.json's entry: both annotations, since containerd reads the one and skopeo and podman the other. */
function indexEntry(image: ResolvedImage): unknown {
  const annotations = { "io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": image.name };
  return { mediaType: image.top.mediaType, digest: image.top.digest, size: image.top.bytes.length, annotations };
}

/** manifest.json's entries, what `docker load` reads: one image for each name. Classic docker cannot name a digest. */
function dockerEntries(images: readonly ResolvedImage[]): unknown[] {
  return images.flatMap((image) => {
    const loadable = image.contents.filter(isImage);
    const content = loadable.find(({ platform }) => formatPlatform(platform) === "linux/amd64") ?? loadable[0];
    if (!content) return [];
    const { config, layers } = content.manifest;
    const tags = image.name.includes("@") ? [] : [image.name];
    return [{ Config: blobPath(config.digest), RepoTags: tags, Layers: layers.map((layer) => blobPath(layer.digest)) }];
  });
}

const json = (value: unknown): Buffer => Buffer.from(JSON.stringify(value), "utf8");

/** `omit` has the digests of layers that the receiving side holds already. */
function planTar(images: readonly ResolvedImage[], omit: ReadonlySet<string> = new Set()): Plan {
  const index = { schemaVersion: 2, mediaType: OCI_INDEX, manifests: images.map(indexEntry) };
  const contents = new Map<string, Pick<PlanEntry, "bytes" | "blob"> & { sizeBytes: number }>([
    ["oci-layout", known(json({ imageLayoutVersion: "1.0.0" }))],
    ["index.json", known(json(index))],
    ["manifest.json", known(json(dockerEntries(images)))],
  ]);
  const omitted = new Map<string, Descriptor>();
  for (const { manifests, contents: parts, registry } of images) {
    for (const { digest, bytes } of manifests) contents.set(blobPath(digest), known(bytes));
    for (const { manifest, configBytes } of parts) {
      for (const descriptor of [manifest.config, ...manifest.layers]) {
        const { digest, size } = descriptor;
        const name = blobPath(digest);
        const planned = contents.get(name);
        if (planned && planned.sizeBytes !== size) {
          throw new ImgpullError("SIZE_MISMATCH", `${digest} is said to have ${size} bytes here and ${planned.sizeBytes} there`);
        }
        if (planned) continue;
        if (omit.has(digest) && descriptor !== manifest.config) omitted.set(digest, descriptor);
        else if (configBytes && descriptor === manifest.config) contents.set(name, known(configBytes));
        else contents.set(name, { sizeBytes: size, blob: { descriptor, registry } });
      }
    }
  }
  const entries: PlanEntry[] = [];
  const identity = createHash("sha256");
  let padding = 0;
  let offset = 0;
  let blobBytes = 0;
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

function known(bytes: Buffer): { bytes: Buffer; sizeBytes: number } {
  return { bytes, sizeBytes: bytes.length };
}

interface TarEntry {
  readonly name: string;
  readonly sizeBytes: number;
  readonly offset: number;
  readonly type: string;
  readonly linkName: string;
}

/** Reads up to `length` bytes; fewer only at the end of the file. */
async function readAt(handle: fs.FileHandle, position: number, length: number, buffer = Buffer.alloc(length)): Promise<Buffer> {
  let filled = 0;
  while (filled < length) {
    const { bytesRead } = await handle.read(buffer, filled, length - filled, position + filled);
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return buffer.subarray(0, filled);
}

/** The entries of a tar that anyone made: ustar, pax, and GNU's long names and base-256 sizes. */
async function* readTar(handle: fs.FileHandle, where: string): AsyncGenerator<TarEntry> {
  const refuse = (reason: string): never => {
    throw new ImgpullError("BAD_TAR", `${where}: ${reason}`);
  };
  const { size } = await handle.stat();
  let extended: Record<string, string> = {};
  for (let position = 0; position < size; ) {
    const header = await readAt(handle, position, BLOCK);
    if (header.length < BLOCK) return refuse("it ends in the middle of a header");
    if (header.every((byte) => byte === 0)) return;
    const text = (start: number, length: number): string => header.toString("utf8", start, start + length).replace(/\0[^]*$/, "");
    const sum = header.reduce((total, byte, at) => total + (at >= 148 && at < 156 ? 32 : byte), 0);
    if (Number.parseInt(text(148, 8).trim(), 8) !== sum) return refuse("it is not a tar, or is damaged (a header's checksum is wrong)");
    // GNU writes a size of 8 GiB and more as a big-endian number behind a set top bit.
    const isBinary = ((header[124] ?? 0) & 0x80) !== 0;
    const plainSize = isBinary ? Number(header.readBigUInt64BE(128)) : Number.parseInt(text(124, 12).trim() || "0", 8);
    const type = text(156, 1) || "0";
    const isMeta = type === "x" || type === "g" || type === "L" || type === "K";
    const sizeBytes = !isMeta && extended.size !== undefined ? Number(extended.size) : plainSize;
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 0) return refuse("an entry's size is not a number");
    const offset = position + BLOCK;
    if (offset + sizeBytes > size) return refuse("it ends in the middle of an entry: it was cut off");
    position = offset + sizeBytes + paddingOf(sizeBytes);
    if (isMeta) {
      if (sizeBytes > LIMITS.tarMetadataBytes) return refuse("an extended header is too large");
      const body = await readAt(handle, offset, sizeBytes);
      if (type === "x") extended = { ...extended, ...parsePaxRecords(body) };
      if (type === "L") extended.path = body.toString("utf8").replace(/\0[^]*$/, "");
      if (type === "K") extended.linkpath = body.toString("utf8").replace(/\0[^]*$/, "");
      continue;
    }
    const prefix = header.toString("latin1", 257, 263) === "ustar\0" ? text(345, 155) : "";
    const name = extended.path ?? (prefix ? `${prefix}/${text(0, 100)}` : text(0, 100));
    yield { name: name.replace(/^\.\//, ""), sizeBytes, offset, type, linkName: extended.linkpath ?? text(157, 100) };
    extended = {};
  }
}

function parsePaxRecords(body: Buffer): Record<string, string> {
  const records: Record<string, string> = {};
  for (let at = 0; at < body.length; ) {
    const space = body.indexOf(0x20, at);
    const length = Number(body.toString("latin1", at, Math.max(space, at)));
    if (space < 0 || !Number.isInteger(length) || length <= space - at) break;
    const record = body.toString("utf8", space + 1, at + length - 1);
    const equals = record.indexOf("=");
    records[record.slice(0, equals)] = record.slice(equals + 1);
    at += length;
  }
  return records;
}

/** A tar whose entries may be blobs that we need. What it claims is believed only after hashing. */
interface TarSource {
  readonly file: string;
  readonly handle: fs.FileHandle;
  readonly blobs: ReadonlyMap<string, TarEntry>;
}

/** Our tars, OCI archives and docker save name blobs/sha256/HEX; crane HEX.tar.gz and sha256:HEX; skopeo HEX.tar, HEX.json. */
function digestInName(name: string): string | undefined {
  const [, blob, bare] = /^(?:blobs\/(sha256\/[0-9a-f]{64}|sha512\/[0-9a-f]{128})|(?:sha256:)?([0-9a-f]{64})(?:\.json|\.tar|\.tar\.gz)?)$/.exec(name) ?? [];
  return blob?.replace("/", ":") ?? (bare === undefined ? undefined : `sha256:${bare}`);
}

async function openTarSource(file: string): Promise<TarSource> {
  const handle = await fs.open(file, "r").catch((error: unknown) => {
    throw diskError(error, `cannot read ${file}`);
  });
  try {
    const blobs = new Map<string, TarEntry>();
    for await (const entry of readTar(handle, file)) {
      const digest = digestInName(entry.name);
      if (digest !== undefined && (entry.type === "0" || entry.type === "7")) blobs.set(digest, entry);
    }
    return { file, handle, blobs };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

// ====== 12. Pull ======
// Plan → bytes in place → verify → rename. Blobs are fetched side by side into DEST.partial, hashed in order as they come;
// idle connections take over half of the longest remaining range. SPEC §5.
// Invariant: nothing has DEST's name before every byte of it was hashed and compared.

type Range = [from: number, to: number];

/** Adds a range to a sorted list of disjoint ones. */
function addRange(ranges: readonly Range[], [from, to]: Range): Range[] {
  const apart = ranges.filter(([start, end]) => end < from || start > to);
  const touching = ranges.filter(([start, end]) => end >= from && start <= to);
  const merged: Range = [Math.min(from, ...touching.map(([start]) => start)), Math.max(to, ...touching.map(([, end]) => end))];
  return [...apart, merged].sort((left, right) => left[0] - right[0]);
}

function missingRanges(ranges: readonly Range[], sizeBytes: number): Range[] {
  const edges = [0, ...ranges.flat(), sizeBytes];
  const gaps: Range[] = [];
  for (let at = 0; at < edges.length; at += 2) gaps.push([edges[at] as number, edges[at + 1] as number]);
  return gaps.filter(([from, to]) => from < to);
}

/** A blob on its way. Bytes below `hashedTo` are in place and hashed. */
interface BlobJob {
  readonly descriptor: Descriptor;
  readonly registry: Registry;
  /** Of the content in the tar; 0 where each blob is a file of its own. */
  readonly offset: number;
  hash: Hash;
  hashedTo: number;
  written: Range[];
  hashing: Promise<void> | undefined;
  openSegments: number;
  /** Fetches from the start that are left after bytes turned out wrong. */
  freshStarts: number;
  doneBytes: number;
  unrecordedBytes: number;
  isDone: boolean;
}

/** A range that one connection fetches: `at` is the next byte, and `to` may come down when another takes the end over. */
interface Segment {
  readonly job: BlobJob;
  at: number;
  to: number;
  readonly isTakeover: boolean;
  startedAtMs: number;
  firstByteMs: number;
  receivedBytes: number;
}

/** What progress shows and the result sums up. */
interface Transfer {
  readonly jobs: readonly BlobJob[];
  readonly active: Set<Segment>;
  readonly totalBytes: number;
  fetchedBytes: number;
  reusedBytes: number;
  resumedBytes: number;
  changed: (finished?: BlobJob) => void;
}

/** Where bytes go. The file form hashes as bytes come and again from disk where they came out of order; the stream form in order. */
interface Sink {
  accept(job: BlobJob, position: number, chunk: Buffer): void;
  write(job: BlobJob, position: number, chunks: Buffer[]): Promise<void>;
  segmentDone(job: BlobJob): void;
  /** All bytes of the blob were written; false asks for them once more. */
  blobDone(job: BlobJob): Promise<boolean>;
  /** The longest range asked for in one request. */
  readonly unitBytes: (job: BlobJob) => number;
  readonly isSplitting: boolean;
}

function newJob(descriptor: Descriptor, registry: Registry, offset: number): BlobJob {
  return {
    descriptor, registry, offset, hash: newHash(descriptor.digest), hashedTo: 0, written: [], hashing: undefined,
    openSegments: 0, freshStarts: 1, doneBytes: 0, unrecordedBytes: 0, isDone: false,
  };
}

function startAfresh(job: BlobJob): void {
  Object.assign(job, { hash: newHash(job.descriptor.digest), hashedTo: 0, written: [], doneBytes: 0, hashing: undefined });
}

function newSegment(job: BlobJob, at: number, to: number, isTakeover = false): Segment {
  job.openSegments += isTakeover ? 0 : 1;
  return { job, at, to, isTakeover, startedAtMs: 0, firstByteMs: 0, receivedBytes: 0 };
}

/** Runs all jobs to their end over at most `concurrency` connections, or throws the first error with all of them closed. */
async function fetchBlobs(session: Session, transfer: Transfer, sink: Sink): Promise<void> {
  const stop = new AbortController();
  const signal = AbortSignal.any([session.signal, stop.signal]);
  const { active } = transfer;
  const pending: Segment[] = [];
  let connections = session.settings.concurrency;
  let wake: (() => void)[] = [];

  const enqueue = (job: BlobJob): void => {
    for (const [from, to] of missingRanges(job.written, job.descriptor.size)) {
      const unit = sink.unitBytes(job);
      for (let at = from; at < to; at += unit) pending.push(newSegment(job, at, Math.min(to, at + unit)));
    }
  };
  const remaining = (segment: Segment): number => segment.to - segment.at;
  const cut = (victim: Segment): Segment => {
    const middle = victim.at + Math.ceil(remaining(victim) / 2);
    const rest = newSegment(victim.job, middle, victim.to, true);
    victim.job.openSegments += 1;
    victim.to = middle;
    return rest;
  };
  const canCut = (segment: Segment): boolean =>
    sink.isSplitting && segment.job.registry.acceptsRanges && remaining(segment) >= 2 * LIMITS.splitBytes;
  const longest = (segments: Iterable<Segment>): Segment | undefined =>
    [...segments].filter(canCut).sort((left, right) => remaining(right) - remaining(left))[0];

  /** Whether half of what a connection has left takes longer than a new request costs, on a line that is not full. */
  const isWorthTaking = (victim: Segment): boolean => {
    const now = performance.now();
    const rate = (segment: Segment): number => segment.receivedBytes / Math.max(1, now - segment.startedAtMs);
    const lineRate = [...active].reduce((sum, segment) => sum + rate(segment), 0);
    const latencyMs = Math.max(50, 4 * (victim.firstByteMs || now - victim.startedAtMs));
    if (lineRate * 1000 > LIMITS.fastLineBytesPerSecond || now - victim.startedAtMs < 50) return false;
    return remaining(victim) / Math.max(rate(victim), 1) > latencyMs;
  };
  const take = (): Segment | undefined => {
    const next = pending.shift();
    if (next) return next;
    const victim = longest(active);
    return victim && isWorthTaking(victim) ? cut(victim) : undefined;
  };
  const idle = async (): Promise<void> => {
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, 20);
      wake.push(() => (clearTimeout(timer), resolve()));
    });
  };
  const done = async (segment: Segment): Promise<void> => {
    const { job } = segment;
    job.openSegments -= 1;
    sink.segmentDone(job);
    if (job.openSegments > 0) return;
    if (!(await sink.blobDone(job))) {
      startAfresh(job);
      enqueue(job);
      return;
    }
    job.isDone = true;
    transfer.changed(job);
  };
  const connection = async (): Promise<void> => {
    while (!signal.aborted && (pending.length > 0 || active.size > 0)) {
      if (active.size >= connections) return;
      const segment = take();
      if (!segment) {
        await idle();
        continue;
      }
      active.add(segment);
      try {
        await fetchSegment(session, { transfer, sink, signal, pending, segment, slowDown: () => (connections = Math.max(1, active.size - 1)) });
      } finally {
        active.delete(segment);
        wake.forEach((resume) => resume());
        wake = [];
      }
      await done(segment);
    }
  };

  for (const job of transfer.jobs) if (!job.isDone) enqueue(job);
  // A far line is worth several connections before its speed is known: closed ranges from the start waste nothing.
  const isFar = (segment: Segment): boolean => segment.job.registry.latencyMs >= LIMITS.farLatencyMs;
  for (let victim = longest(pending.filter(isFar)); victim && pending.length < connections; victim = longest(pending.filter(isFar))) {
    pending.push(cut(victim));
  }
  if (sink.isSplitting) pending.sort((left, right) => remaining(right) - remaining(left));
  for (const job of transfer.jobs) if (!job.isDone && job.openSegments === 0) pending.push(newSegment(job, 0, 0)); // an empty blob
  const lanes = Array.from({ length: connections }, async () => {
    try {
      await connection();
    } catch (error) {
      stop.abort();
      throw error;
    }
  });
  const results = await Promise.allSettled(lanes);
  const failures = results.flatMap((result) => (result.status === "rejected" ? [result.reason as unknown] : []));
  if (session.signal.aborted) throw new ImgpullError("ABORTED", "stopped");
  const isStopped = (error: unknown): boolean => error instanceof ImgpullError && error.code === "ABORTED";
  if (failures.length > 0) throw failures.find((failure) => !isStopped(failure)) ?? failures[0];
}

interface SegmentRun {
  readonly transfer: Transfer;
  readonly sink: Sink;
  readonly signal: AbortSignal;
  readonly pending: Segment[];
  readonly segment: Segment;
  readonly slowDown: () => void;
}

/** Fetches a range to its end, however many answers that takes. */
async function fetchSegment(session: Session, run: SegmentRun): Promise<void> {
  const { segment, transfer } = run;
  const { job } = segment;
  let before = segment.at;
  // Getting on means more than a trickle: otherwise a server that sends a byte a time would be asked for ever.
  const gotOn = (): boolean => {
    const enough = segment.at - before >= Math.min(LIMITS.batchBytes, Math.ceil(job.descriptor.size / 64));
    before = segment.at;
    return enough;
  };
  const attempt = async (): Promise<void> => {
    while (segment.at < segment.to) {
      try {
        await receive(run);
      } catch (error) {
        // A registry that takes no more connections gets fewer: the range goes back to where it was taken from.
        const isCrowded = error instanceof ImgpullError && error.code === "RATE_LIMITED" && segment.isTakeover;
        const owner = [...transfer.active].find((other) => other.job === job && other.to === segment.at && other !== segment);
        if (!isCrowded || !owner) throw error;
        run.slowDown();
        owner.to = segment.to;
        segment.to = segment.at;
      }
    }
  };
  await withRetries(session, run.signal, attempt, gotOn);
}

/** One request for what a segment still lacks, and its bytes into the sink. */
async function receive(run: SegmentRun): Promise<void> {
  const { segment, sink, transfer } = run;
  const { job } = segment;
  const { descriptor, registry } = job;
  segment.startedAtMs = performance.now();
  segment.receivedBytes = 0;
  const isRange = segment.at > 0 || segment.to < descriptor.size;
  const answer = await registry.blob(descriptor, segment.at, segment.to, run.signal);
  const body = answer.body as http.IncomingMessage;
  segment.firstByteMs = performance.now() - segment.startedAtMs;
  const doing = `GET ${redactUrl(answer.url)}`;
  const refuse = (error: ImgpullError): never => {
    body.destroy();
    throw error;
  };
  let position = 0;
  let end = descriptor.size;
  if (answer.status === 206) {
    const [, first, last, total] = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(String(answer.headers["content-range"])) ?? [];
    position = Number(first);
    end = Number(last) + 1;
    if (position !== segment.at || !(end > position && end <= descriptor.size) || (total !== "*" && Number(total) !== descriptor.size)) {
      refuse(new ImgpullError("PROTOCOL", `${doing}: asked for bytes ${segment.at}-${segment.to - 1} of ${descriptor.size}, ` +
        `got "${printable(String(answer.headers["content-range"]), 80)}"`, { status: 206 }));
    }
  } else if (isRange) {
    registry.acceptsRanges = false;
    if (!keepWhole(run)) return void body.destroy();
  }
  const stream = decodeBody(body, end - position);
  const length = answer.headers["content-length"];
  if (stream === body && length !== undefined && Number(length) !== end - position) {
    refuse(new ImgpullError("SIZE_MISMATCH", `${doing}: ${length} bytes were announced where ${end - position} belong`));
  }

  let gathered: Buffer[] = [];
  let gatheredBytes = 0;
  let isTooLong = false;
  let writing = Promise.resolve();
  const flush = async (): Promise<void> => {
    const [chunks, from] = [gathered, segment.at - gatheredBytes];
    const previous = writing;
    gathered = [];
    gatheredBytes = 0;
    writing = previous.then(async () => await sink.write(job, from, chunks));
    writing.catch(() => undefined); // it is awaited below
    await previous; // one batch is on its way to disk while the next one is gathered
  };
  const take = (chunk: Buffer): void => {
    const skipped = Math.min(chunk.length, Math.max(0, segment.at - position));
    const wanted = chunk.subarray(skipped, skipped + Math.max(0, segment.to - segment.at));
    position += chunk.length;
    isTooLong ||= position > end;
    if (wanted.length === 0) return;
    sink.accept(job, segment.at, wanted);
    gathered.push(wanted);
    gatheredBytes += wanted.length;
    segment.at += wanted.length;
    segment.receivedBytes += wanted.length;
    job.doneBytes += wanted.length;
    transfer.fetchedBytes += wanted.length;
  };
  const writer = new Writable({
    write: (chunk: Buffer, _encoding, callback) => {
      take(chunk);
      // Another connection has taken the rest over: this answer is not needed to its end.
      if (isTooLong || (segment.at >= segment.to && position < end)) stream.destroy();
      if (gatheredBytes < LIMITS.batchBytes) return callback();
      transfer.changed();
      flush().then(() => callback(), callback);
    },
  });
  let failure: unknown;
  try {
    await pipeline(stream, writer, { signal: run.signal });
  } catch (error) {
    failure = error;
  }
  if (gatheredBytes > 0) await flush();
  await writing;
  transfer.changed();
  if (isTooLong) throw new ImgpullError("SIZE_MISMATCH", `${doing}: more than the ${descriptor.size} bytes that belong there`);
  if (segment.at >= segment.to) return;
  if (run.signal.aborted) throw new ImgpullError("ABORTED", "stopped");
  if (failure instanceof ImgpullError) throw failure;
  if (position < end) {
    const words = `the connection ended after ${position} of ${end} bytes`;
    throw new ImgpullError("NETWORK", `${doing}: ${words}`, { cause: failure });
  }
}

/**
 * The server sent the whole where a range was asked for. If the bytes before are being fetched by another connection,
 * that one goes on into this range, and this answer is not needed; otherwise what comes first is skipped, and what
 * nobody has begun is taken along.
 */
function keepWhole({ segment, transfer, pending }: SegmentRun): boolean {
  const ofJob = (other: Segment): boolean => other.job === segment.job && other !== segment;
  const owner = [...transfer.active].find((other) => ofJob(other) && other.to === segment.at && other.at < other.to);
  if (owner) {
    owner.to = segment.to;
    segment.to = segment.at;
    return false;
  }
  for (;;) {
    const next = pending.findIndex((other) => ofJob(other) && other.at === segment.to);
    const [follower] = next < 0 ? [] : pending.splice(next, 1);
    if (!follower) return true;
    segment.to = follower.to;
    segment.job.openSegments -= 1;
  }
}

/** Hashes what lies at a place; `each` sees the pieces, in order. */
async function hashPlace(
  handle: fs.FileHandle, from: number, to: number, hash: Hash, each?: (piece: Buffer, at: number) => unknown,
): Promise<void> {
  const buffer = Buffer.allocUnsafe(Math.min(LIMITS.batchBytes, to - from));
  for (let at = from; at < to; ) {
    const piece = await readAt(handle, at, Math.min(buffer.length, to - at), buffer);
    if (piece.length === 0) throw new ImgpullError("DISK", "a file became shorter while it was read");
    hash.update(piece);
    await each?.(piece, at);
    at += piece.length;
  }
}

async function writeAll(handle: fs.FileHandle, chunks: Buffer[], position: number): Promise<void> {
  const total = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  const { bytesWritten } = await handle.writev(chunks, position);
  if (bytesWritten < total) await writeAll(handle, [Buffer.concat(chunks).subarray(bytesWritten)], position + bytesWritten);
}

/** What the partial file holds, line by line, so that a kill -9 leaves it true: the plan's id, then `digest from-to,…`. */
async function openJournal(file: string, planId: string): Promise<{
  held: ReadonlyMap<string, Range[]>; record: (job: BlobJob) => void; close: () => Promise<void>;
}> {
  const [id, ...lines] = ((await readOptional(file)) ?? "").split("\n");
  const held = new Map<string, Range[]>();
  for (const line of id === planId ? lines : []) {
    const [, digest, ranges] = /^(\S+) ((?:\d+-\d+,)*\d+-\d+);$/.exec(line) ?? [];
    if (digest && ranges) held.set(digest, ranges.split(",").map((range) => range.split("-").map(Number) as Range));
  }
  const handle = await fs.open(file, id === planId ? "a" : "w");
  let writing: Promise<unknown> = id === planId ? Promise.resolve() : handle.appendFile(`${planId}\n`);
  return {
    held,
    record: (job) => {
      job.unrecordedBytes = 0;
      const line = `${job.descriptor.digest} ${job.written.map((range) => range.join("-")).join(",")};\n`;
      writing = writing.then(async () => await handle.appendFile(line)).catch(() => undefined); // losing it costs bytes only
    },
    close: async () => {
      await writing.catch(() => undefined);
      await handle.close();
    },
  };
}

/** Two runs at one DEST would write over each other: the second stops. A run that died leaves a lock that is taken over. */
async function acquireLock(file: string, dest: string): Promise<() => Promise<void>> {
  const mine = JSON.stringify({ pid: process.pid, host: os.hostname(), nonce: Math.random() });
  const isAlive = (pid: number): boolean => {
    try {
      return process.kill(pid, 0);
    } catch (error) {
      return errorCodeOf(error) === "EPERM";
    }
  };
  try {
    await fs.writeFile(file, mine, { flag: "wx" });
  } catch (error) {
    if (errorCodeOf(error) !== "EEXIST") throw diskError(error, `cannot write ${dest}`);
    const text = (await readOptional(file)) ?? "";
    const owner = /^\{"pid":(\d+),"host":"([^"]*)"/.exec(text);
    const isOurs = Number(owner?.[1]) === process.pid;
    if (owner && (owner[2] !== os.hostname() || isOurs || isAlive(Number(owner[1])))) {
      throw new ImgpullError("DISK", `${dest} is being pulled by another imgpull (process ${owner[1]} on ${owner[2]})\n` +
        `  if that is not so, remove ${file}`);
    }
    await fs.writeFile(`${file}.${process.pid}`, mine);
    await fs.rename(`${file}.${process.pid}`, file);
    await delay(20); // another that saw the same stale lock has put its own here by now: the last one has it
    if ((await readOptional(file)) !== mine) throw new ImgpullError("DISK", `${dest} is being pulled by another imgpull`);
  }
  return async () => await fs.rm(file, { force: true });
}

/** Where each blob's bytes are put: all in one tar, or each in a file of its own. */
interface Places {
  readonly open: (job: BlobJob) => Promise<fs.FileHandle>;
  readonly finish: (job: BlobJob) => Promise<void>;
}

type Observer = (transfer: Transfer, finished?: BlobJob) => void;

function newTransfer(jobs: readonly BlobJob[], observe: Observer): Transfer {
  const transfer: Transfer = {
    jobs, active: new Set(), totalBytes: jobs.reduce((sum, job) => sum + job.descriptor.size, 0), fetchedBytes: 0,
    reusedBytes: 0, resumedBytes: 0, changed: (finished) => observe(transfer, finished),
  };
  return transfer;
}

/** Brings every job's bytes to its place: what the journal says is there, then what other tars hold, then the registry. */
async function fillPlaces(session: Session, jobs: readonly BlobJob[], more: {
  base: string; planId: string; places: Places; sources: readonly TarSource[]; observe: Observer;
}): Promise<Transfer> {
  const { places, base } = more;
  const transfer = newTransfer(jobs, more.observe);
  const journal = await openJournal(`${base}.journal`, more.planId).catch((error: unknown) => {
    throw diskError(error, `cannot write ${base}.journal`);
  });
  /** Hashes, from disk, what is written beyond what is hashed: bytes that an earlier run or another connection put there. */
  const catchUp = (job: BlobJob): Promise<void> => (job.hashing ??= (async () => {
    for (;;) {
      const to = job.written.find(([from, end]) => from <= job.hashedTo && end > job.hashedTo)?.[1];
      if (to === undefined) return;
      const from = job.offset + job.hashedTo;
      await hashPlace(await places.open(job), from, job.offset + to, job.hash);
      job.hashedTo = to;
    }
  })().finally(() => (job.hashing = undefined)));
  const verify = async (job: BlobJob): Promise<boolean> => {
    while (job.hashedTo < job.descriptor.size) await catchUp(job);
    return `${job.descriptor.digest.split(":")[0]}:${job.hash.digest("hex")}` === job.descriptor.digest;
  };
  const finish = async (job: BlobJob): Promise<void> => {
    await places.finish(job);
    journal.record(job);
  };
  const sink: Sink = {
    isSplitting: true,
    unitBytes: () => Number.POSITIVE_INFINITY,
    accept: (job, position, chunk) => {
      if (job.hashing || position !== job.hashedTo) return;
      job.hash.update(chunk);
      job.hashedTo += chunk.length;
    },
    write: async (job, position, chunks) => {
      const length = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
      await writeAll(await places.open(job), chunks, job.offset + position);
      job.written = addRange(job.written, [position, position + length]);
      job.unrecordedBytes += length;
      if (job.unrecordedBytes >= LIMITS.journalBytes) journal.record(job);
      if (position <= job.hashedTo && job.hashedTo < position + length) catchUp(job).catch(() => undefined); // verify() meets it too
    },
    segmentDone: (job) => journal.record(job),
    blobDone: async (job) => {
      if (!(await verify(job))) {
        const wrong = `${job.descriptor.digest}: the bytes that came have another digest`;
        if (job.freshStarts === 0) throw new ImgpullError("DIGEST_MISMATCH", `${wrong}, from ${job.registry.origin}`);
        job.freshStarts -= 1;
        session.warn(`${wrong}; fetching the blob once more`);
        return false;
      }
      await finish(job);
      return true;
    },
  };
  try {
    for (const job of jobs) {
      if (session.signal.aborted) throw new ImgpullError("ABORTED", "stopped");
      const { digest, size } = job.descriptor;
      job.written = (journal.held.get(digest) ?? []).filter(([from, to]) => from < to && to <= size);
      if (size > 0 && missingRanges(job.written, size).length === 0) {
        if (await verify(job)) job.isDone = true;
        else startAfresh(job);
      } else if (job.written.length > 0) {
        job.freshStarts += 1; // if the disk lost what the journal says, that is not the registry's fault
        void catchUp(job);
      }
      job.doneBytes = job.written.reduce((sum, [from, to]) => sum + to - from, 0);
      transfer.resumedBytes += job.doneBytes;
      if (job.written.length === 0 && (await copyFromSources(job, more.sources, places))) {
        Object.assign(job, { isDone: true, doneBytes: size, written: [[0, size]] });
        transfer.reusedBytes += size;
      }
      if (!job.isDone) continue;
      await finish(job);
      transfer.changed(job);
    }
    await fetchBlobs(session, transfer, sink);
    return transfer;
  } catch (error) {
    throw error instanceof ImgpullError || !(error as NodeJS.ErrnoException).syscall ? error : diskError(error, `cannot write ${base}`);
  } finally {
    await Promise.all(jobs.map((job) => job.hashing?.catch(() => undefined)));
    for (const job of jobs) if (job.unrecordedBytes > 0) journal.record(job);
    await journal.close();
  }
}

/** Copies a blob out of a tar that claims to hold it; true only where its digest says so. */
async function copyFromSources(job: BlobJob, sources: readonly TarSource[], places: Places): Promise<boolean> {
  const { digest, size } = job.descriptor;
  for (const { handle, blobs } of sources) {
    const entry = blobs.get(digest);
    if (entry?.sizeBytes !== size) continue;
    const hash = newHash(digest);
    const target = await places.open(job);
    await hashPlace(handle, entry.offset, entry.offset + size, hash, async (piece, at) => {
      await writeAll(target, [piece], job.offset + at - entry.offset);
    });
    if (`${digest.split(":")[0]}:${hash.digest("hex")}` === digest) return true;
  }
  return false;
}

/** Sync where the file system and Node's permission model let us; what they refuse is no reason to fail. */
async function syncQuietly(handle: fs.FileHandle): Promise<void> {
  await handle.sync().catch((error: unknown) => {
    if (!["ERR_ACCESS_DENIED", "EINVAL", "ENOSYS", "ENOTSUP", "EPERM"].includes(errorCodeOf(error))) throw error;
  });
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await fs.open(folder, "r").catch(() => undefined); // Windows has no handle for a folder
  if (handle) await syncQuietly(handle).finally(async () => await handle.close());
}

async function checkFreeSpace(folder: string, neededBytes: number, dest: string): Promise<void> {
  const stats = await fs.statfs(folder).catch(() => undefined);
  const freeBytes = stats ? stats.bavail * stats.bsize : Number.POSITIVE_INFINITY;
  if (neededBytes > freeBytes) {
    throw new ImgpullError("DISK", `cannot write ${dest}: it needs ${formatBytes(neededBytes)} and ${folder} has ${formatBytes(freeBytes)} free`);
  }
}

function jobsOf(plan: Plan, isOwnFile: boolean): BlobJob[] {
  return plan.entries.flatMap(({ blob, offset }) => (blob ? [newJob(blob.descriptor, blob.registry, isOwnFile ? 0 : offset)] : []));
}

/** The plan into `dest` by way of `dest`.partial. */
async function pullToTar(session: Session, plan: Plan, dest: string, reuse: readonly TarSource[], observe: Observer): Promise<Transfer> {
  const partial = `${dest}.partial`;
  const old = `${partial}.old`;
  const unlock = await acquireLock(`${partial}.lock`, dest);
  const sources = [...reuse];
  const opened: fs.FileHandle[] = [];
  const addSource = async (file: string): Promise<void> => {
    const source = await openTarSource(file).catch(() => undefined); // what is there may be anything
    if (!source) return;
    sources.push(source);
    opened.push(source.handle);
  };
  let worthKeeping = true;
  try {
    const journaledId = (await readOptional(`${partial}.journal`))?.split("\n")[0];
    // A partial of another plan (the tag has moved on) is not at our offsets, but its blobs can be copied.
    if (journaledId !== plan.id) await fs.rename(partial, old).catch(() => undefined);
    for (const file of [old, dest]) await addSource(file);
    const handle = await fs.open(partial, fs.constants.O_RDWR | fs.constants.O_CREAT, 0o666);
    opened.push(handle);
    const { blocks } = await handle.stat();
    await checkFreeSpace(path.dirname(dest), plan.sizeBytes - blocks * BLOCK, dest);
    for (const { lead, bytes, offset } of plan.entries) await writeAll(handle, [lead, bytes ?? Buffer.alloc(0)], offset - lead.length);
    await writeAll(handle, [plan.trailer], plan.sizeBytes - plan.trailer.length);
    await handle.truncate(plan.sizeBytes);
    const jobs = jobsOf(plan, false);
    try {
      const places = { open: async () => handle, finish: async () => undefined };
      const transfer = await fillPlaces(session, jobs, { base: partial, planId: plan.id, places, sources, observe });
      await syncQuietly(handle);
      await fs.rename(partial, dest);
      worthKeeping = false;
      await syncFolder(path.dirname(dest));
      return transfer;
    } catch (error) {
      const keptBytes = jobs.flatMap((job) => job.written).reduce((sum, [from, to]) => sum + to - from, 0);
      worthKeeping = keptBytes > 0;
      if (worthKeeping) session.warn(`${partial} keeps ${formatBytes(keptBytes)}: the same command goes on from there`);
      throw error;
    }
  } catch (error) {
    throw error instanceof ImgpullError || !(error as NodeJS.ErrnoException).syscall ? error : diskError(error, `cannot write ${dest}`);
  } finally {
    await Promise.all(opened.map(async (handle) => await handle.close()));
    if (!worthKeeping) for (const file of [partial, `${partial}.journal`, old]) await fs.rm(file, { force: true });
    await unlock();
  }
}

async function replaceFile(file: string, bytes: Uint8Array | string): Promise<void> {
  await fs.writeFile(`${file}.partial`, bytes, { flush: true } as object);
  await fs.rename(`${file}.partial`, file);
}

/** Each blob as a file of its own under `folder`; those that are there already are verified and kept. */
async function pullToFolder(session: Session, jobs: readonly BlobJob[], folder: string, nameOf: (digest: string) => string, observe: Observer): Promise<Transfer> {
  const base = path.join(folder, ".imgpull.partial");
  const handles = new Map<BlobJob, Promise<fs.FileHandle>>();
  const fileOf = (job: BlobJob): string => path.join(folder, nameOf(job.descriptor.digest));
  const open = async (job: BlobJob): Promise<fs.FileHandle> => {
    const handle = handles.get(job) ?? fs.open(`${fileOf(job)}.partial`, fs.constants.O_RDWR | fs.constants.O_CREAT, 0o666);
    handles.set(job, handle);
    return await handle;
  };
  const finish = async (job: BlobJob): Promise<void> => {
    const handle = await open(job);
    await handle.truncate(job.descriptor.size);
    await syncQuietly(handle);
    await handle.close();
    handles.delete(job);
    await fs.rename(`${fileOf(job)}.partial`, fileOf(job));
  };
  const missing: BlobJob[] = [];
  for (const job of jobs) (await isVerifiedFile(fileOf(job), job.descriptor)) ? (job.doneBytes = job.descriptor.size) : missing.push(job);
  await checkFreeSpace(folder, missing.reduce((sum, job) => sum + job.descriptor.size, 0), folder);
  const unlock = await acquireLock(`${base}.lock`, folder);
  try {
    const transfer = await fillPlaces(session, missing, { base, planId: "folder", places: { open, finish }, sources: [], observe });
    transfer.reusedBytes = jobs.filter((job) => !missing.includes(job)).reduce((sum, job) => sum + job.descriptor.size, 0);
    await fs.rm(`${base}.journal`, { force: true });
    return transfer;
  } finally {
    for (const handle of handles.values()) await (await handle).close();
    await unlock();
  }
}

async function isVerifiedFile(file: string, { digest, size }: Descriptor): Promise<boolean> {
  const handle = await fs.open(file, "r").catch(() => undefined);
  if (!handle) return false;
  try {
    if ((await handle.stat()).size !== size) return false;
    const hash = newHash(digest);
    await hashPlace(handle, 0, size, hash);
    return `${digest.split(":")[0]}:${hash.digest("hex")}` === digest;
  } finally {
    await handle.close();
  }
}

/** An OCI image layout: blobs first, then the index that names them, in one step and beside what it named before. */
async function pullToLayout(session: Session, plan: Plan, folder: string, observe: Observer): Promise<Transfer> {
  try {
    await fs.mkdir(path.join(folder, "blobs/sha256"), { recursive: true });
    await fs.mkdir(path.join(folder, "blobs/sha512"), { recursive: true });
    const transfer = await pullToFolder(session, jobsOf(plan, true), folder, blobPath, observe);
    for (const { name, bytes } of plan.entries) if (bytes && name.startsWith("blobs/")) await replaceFile(path.join(folder, name), bytes);
    const file = path.join(folder, "index.json");
    const before = (await readOptional(file)) ?? "{}";
    const old: unknown = JSON.parse(before);
    const ours = JSON.parse(String(plan.entries.find(({ name }) => name === "index.json")?.bytes)) as { manifests: Descriptor[] };
    const nameOf = (entry: Descriptor): string | undefined => entry.annotations?.["org.opencontainers.image.ref.name"];
    const names = new Set(ours.manifests.map(nameOf));
    const others = isRecord(old) && Array.isArray(old.manifests) ? (old.manifests as Descriptor[]).filter((entry) => !names.has(nameOf(entry))) : [];
    await replaceFile(path.join(folder, "oci-layout"), json({ imageLayoutVersion: "1.0.0" }));
    await replaceFile(file, json({ ...(isRecord(old) ? old : {}), ...ours, manifests: [...others, ...ours.manifests] }));
    await fs.rmdir(path.join(folder, "blobs/sha512")).catch(() => undefined);
    await syncFolder(folder);
    return transfer;
  } catch (error) {
    if (error instanceof SyntaxError) throw new ImgpullError("DISK", `${folder}: its index.json is not JSON`, { cause: error });
    throw (error as NodeJS.ErrnoException).syscall ? diskError(error, `cannot write ${folder}`) : error;
  }
}

/** The plan in order onto a stream. Bytes that come early wait in a window; the trailer is written only if all was right. */
async function pullToStream(session: Session, plan: Plan, output: NodeJS.WritableStream, sources: readonly TarSource[], observe: Observer): Promise<Transfer> {
  const jobs = jobsOf(plan, false);
  const transfer = newTransfer(jobs, observe);
  const early = new Map<number, Buffer[]>(); // by offset in the tar
  const stop = new AbortController();
  const signal = AbortSignal.any([session.signal, stop.signal]);
  let cursor = 0;
  let waiting: (() => void)[] = [];
  const change = async (): Promise<void> => await new Promise((resolve) => waiting.push(resolve));
  const wakeAll = (): void => {
    for (const resume of waiting.splice(0)) resume();
  };
  signal.addEventListener("abort", wakeAll);
  const until = async (isReady: () => boolean): Promise<void> => {
    while (!isReady()) {
      if (signal.aborted) throw new ImgpullError("ABORTED", "stopped");
      await change();
    }
  };
  const emit = async (bytes: Buffer): Promise<void> => {
    if (bytes.length > 0 && !output.write(bytes)) await drained(output, signal);
    cursor += bytes.length;
    wakeAll();
  };
  const sink: Sink = {
    isSplitting: false,
    unitBytes: ({ registry }) =>
      registry.acceptsRanges && registry.latencyMs >= LIMITS.farLatencyMs ? LIMITS.streamUnitBytes : Number.POSITIVE_INFINITY,
    accept: () => undefined,
    write: async (job, position, chunks) => {
      const offset = job.offset + position;
      await until(() => offset < cursor + LIMITS.streamWindowBytes);
      early.set(offset, chunks);
      wakeAll();
    },
    segmentDone: () => undefined,
    blobDone: async () => true,
  };
  const emitBlob = async (job: BlobJob): Promise<void> => {
    const end = job.offset + job.descriptor.size;
    const source = await sourceOf(job.descriptor, sources);
    if (source) return await hashPlace(source.handle, source.offset, source.offset + job.descriptor.size, newHash("sha256:"), emit);
    while (cursor < end) {
      await until(() => early.has(cursor));
      const chunks = early.get(cursor) ?? [];
      early.delete(cursor);
      for (const chunk of chunks) {
        job.hash.update(chunk);
        await emit(chunk);
      }
    }
    if (`${job.descriptor.digest.split(":")[0]}:${job.hash.digest("hex")}` !== job.descriptor.digest) {
      throw new ImgpullError("DIGEST_MISMATCH", `${job.descriptor.digest}: the bytes that came have another digest`);
    }
  };
  const emitAll = async (): Promise<void> => {
    const byDigest = new Map(jobs.map((job) => [job.descriptor.digest, job]));
    for (const { lead, bytes, blob } of plan.entries) {
      await emit(lead);
      if (bytes) await emit(bytes);
      const job = blob && byDigest.get(blob.descriptor.digest);
      if (job) await emitBlob(job);
    }
    await emit(plan.trailer);
  };
  for (const job of jobs) {
    if (!(await sourceOf(job.descriptor, sources))) continue;
    Object.assign(job, { isDone: true, doneBytes: job.descriptor.size });
    transfer.reusedBytes += job.descriptor.size;
  }
  const broken = (error: Error): void => stop.abort(error);
  output.on("error", broken);
  const ends = [fetchBlobs({ ...session, signal }, transfer, sink), emitAll()].map(async (end) => {
    await end.catch((error: unknown) => {
      stop.abort(error);
      throw error;
    });
  });
  await Promise.allSettled(ends);
  output.off("error", broken);
  if (session.signal.aborted) throw new ImgpullError("ABORTED", "stopped");
  const reason = stop.signal.reason as Error | undefined;
  if (stop.signal.aborted) throw (reason as NodeJS.ErrnoException).syscall ? diskError(reason, "cannot write the stream") : reason;
  return transfer;
}

/** A blob in a tar at hand, hashed before a byte of it is passed on. */
async function sourceOf({ digest, size }: Descriptor, sources: readonly TarSource[]): Promise<{ handle: fs.FileHandle; offset: number } | undefined> {
  for (const { handle, blobs } of sources) {
    const entry = blobs.get(digest);
    if (entry?.sizeBytes !== size) continue;
    const hash = newHash(digest);
    await hashPlace(handle, entry.offset, entry.offset + size, hash);
    if (`${digest.split(":")[0]}:${hash.digest("hex")}` === digest) return { handle, offset: entry.offset };
  }
  return undefined;
}

async function drained(output: NodeJS.WritableStream, signal: AbortSignal): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    const settle = (error?: Error): void => {
      output.off("drain", settle).off("close", closed);
      signal.removeEventListener("abort", closed);
      error ? reject(error) : resolve();
    };
    const closed = (): void => settle(new ImgpullError("ABORTED", "the reader has gone"));
    output.once("drain", settle).once("close", closed);
    signal.addEventListener("abort", closed, { once: true });
  });
}

// ====== 13. Puller ======
// References → resolved images → plan → DEST. Everything is resolved, and every failure named, before a layer moves.

/** Reads a config before its turn, where the platform stands nowhere else. */
async function fetchConfig(session: Session, registry: Registry, descriptor: Descriptor): Promise<Buffer> {
  return await withRetries(session, session.signal, async () => {
    const answer = await registry.blob(descriptor, 0, descriptor.size, session.signal);
    const bytes = await readBody(answer.body as http.IncomingMessage, LIMITS.configBytes, `the config ${descriptor.digest}`);
    if (digestOf(bytes, descriptor.digest) === descriptor.digest && bytes.length === descriptor.size) return bytes;
    throw new ImgpullError("DIGEST_MISMATCH", `${redactUrl(answer.url)}: the config's bytes have another digest`);
  });
}

/** The manifests for one reference: the platform's, or all of them. */
async function resolveImage(session: Session, reference: Reference, name: string, isAll: boolean): Promise<ResolvedImage> {
  const where = formatReference(reference);
  const registry = new Registry(session, reference);
  const { wanted } = session.settings;
  const top = await registry.manifest(reference.digest ?? (reference.tag as string));
  const parsed = parseManifest(top, where);
  const common = { reference, name, registry };
  const fetchChild = async (entry: Descriptor): Promise<FetchedManifest> => {
    const child = await registry.manifest(entry.digest);
    if (child.bytes.length === entry.size) return child;
    throw new ImgpullError("SIZE_MISMATCH", `${where}: ${entry.digest} has ${child.bytes.length} bytes, not ${entry.size}`);
  };
  const tooDeep = (): never => {
    throw new ImgpullError("TOO_LARGE", `${where}: indexes inside indexes, more than ${LIMITS.indexDepth} deep`);
  };
  if (isAll) {
    const manifests: FetchedManifest[] = [top];
    const contents: ImageContent[] = [];
    const collect = async (fetched: FetchedManifest, manifest: ImageManifest | IndexManifest, entry: Descriptor | undefined, depth: number): Promise<void> => {
      if (depth > LIMITS.indexDepth) tooDeep();
      const platform = entry?.platform === undefined ? {} : { platform: entry.platform };
      if (manifest.kind === "image") return void contents.push({ digest: fetched.digest, manifest, ...platform });
      const children = await mapConcurrently(manifest.manifests, session.settings.concurrency, fetchChild);
      for (const [at, child] of children.entries()) {
        if (manifests.some(({ digest }) => digest === child.digest)) continue;
        manifests.push(child);
        await collect(child, parseManifest(child, where), manifest.manifests[at], depth + 1);
      }
    };
    await collect(top, parsed, undefined, 0);
    const loadable = contents.filter((content) => content.platform?.os !== "unknown");
    return { ...common, top, manifests, contents: [...new Set([...loadable, ...contents])], platform: "all" };
  }
  if (parsed.kind === "image") {
    const isConfig = IMAGE_CONFIG_TYPES.includes(parsed.config.mediaType);
    const configBytes = isConfig ? await fetchConfig(session, registry, parsed.config) : undefined;
    const platform = configBytes && platformOfConfig(configBytes);
    if (platform) checkPlatform(session, where, platform);
    const content = { digest: top.digest, manifest: parsed, ...(platform ? { platform } : {}), ...(configBytes ? { configBytes } : {}) };
    return { ...common, top, manifests: [top], contents: [content], platform: formatPlatform(platform) };
  }
  const host = wantedPlatform(wanted);
  const seen: string[] = [];
  const search = async (index: IndexManifest, platform: Platform, depth: number): Promise<[Descriptor, FetchedManifest] | undefined> => {
    if (depth > LIMITS.indexDepth) tooDeep();
    const usable = index.manifests.filter((entry) => !isAttestation(entry));
    const isNested = (entry: Descriptor): boolean => isIndexType(entry.mediaType);
    const [only] = usable;
    const plain = usable.filter((entry) => !isNested(entry));
    seen.push(...plain.flatMap((entry) => (entry.platform ? [formatPlatform(entry.platform)] : [])));
    const found = matchPlatform(plain, platform) ?? (usable.length === 1 && only && !only.platform && !isNested(only) ? only : undefined);
    if (found) return [found, await fetchChild(found)];
    for (const entry of usable.filter(isNested)) {
      const isOther = entry.platform?.os && !matchPlatform([entry], platform);
      const fetched = isOther ? undefined : await fetchChild(entry);
      const nested = fetched && parseManifest(fetched, where);
      const inside = nested?.kind === "index" ? await search(nested, platform, depth + 1) : undefined;
      if (inside) return inside;
    }
    return undefined;
  };
  let found = await search(parsed, host, 1);
  if (!found && wanted.os === undefined && host.os !== "linux") {
    seen.length = 0;
    found = await search(parsed, { ...host, os: "linux" }, 1);
    if (found) session.warn(`${where} has nothing for ${host.os}: taking linux`);
  }
  if (!found) {
    const choices = [...new Set(seen)].join(", ") || "none";
    throw new ImgpullError("NO_PLATFORM", `${where} has no image for ${formatPlatform(host)}\n  it has: ${printable(choices, 1000)} (--platform)`);
  }
  const [entry, fetched] = found;
  const manifest = parseManifest(fetched, where);
  if (manifest.kind !== "image") throw new ImgpullError("PROTOCOL", `${where}: the entry for ${formatPlatform(host)} is an index`);
  const content = { digest: fetched.digest, manifest, ...(entry.platform ? { platform: entry.platform } : {}) };
  return { ...common, top: fetched, manifests: [fetched], contents: [content], platform: formatPlatform(entry.platform) };
}

function platformOfConfig(bytes: Buffer): Platform | undefined {
  try {
    const config = JSON.parse(bytes.toString("utf8")) as unknown;
    return isRecord(config) && config.os ? parsePlatform(config) : undefined;
  } catch {
    return undefined;
  }
}

/** A single image for another platform than the one asked for is an error; than this machine's, a warning. */
function checkPlatform(session: Session, where: string, platform: Platform): void {
  const { wanted } = session.settings;
  const entry = { mediaType: "", digest: "", size: 0, platform };
  const asked: Platform = {
    os: wanted.os ?? platform.os, architecture: wanted.architecture ?? platform.architecture,
    ...(wanted.variant === undefined ? {} : { variant: wanted.variant }),
  };
  const isAsked = wanted.variant === undefined
    ? asked.os === platform.os && asked.architecture === platform.architecture : matchPlatform([entry], asked) !== undefined;
  if (!isAsked) {
    throw new ImgpullError("NO_PLATFORM", `${where} has no image for ${formatPlatform(asked)}\n  it is one image, for ${formatPlatform(platform)}`);
  }
  const host = wantedPlatform(wanted);
  const isForeign = (platform.os !== host.os && platform.os !== "linux") || platform.architecture !== host.architecture;
  if (isForeign) session.warn(`${where} is one image, for ${formatPlatform(platform)}: not for this machine`);
}

interface PullRequest {
  readonly images: readonly { readonly reference: Reference; readonly name: string }[];
  readonly destination: string | NodeJS.WritableStream;
  readonly isAll: boolean;
  readonly reuse: readonly string[];
  readonly since?: string;
}

/** Warns of layers that some loaders will not take. */
function warnOfLayers(session: Session, images: readonly ResolvedImage[]): void {
  const kinds: [RegExp, string][] = [
    [/zstd/, "has layers compressed with zstd: Docker before 23 and podman before 4 will not load it"],
    [/foreign|nondistributable/, "has foreign layers, which Docker on Linux and some registries do not take"],
  ];
  for (const { contents, name } of images) {
    for (const [pattern, words] of kinds) {
      if (contents.some(({ manifest }) => manifest.layers.some(({ mediaType }) => pattern.test(mediaType)))) session.warn(`${name} ${words}`);
    }
  }
}

async function isDirectory(file: string): Promise<boolean> {
  return await fs.stat(file).then((stats) => stats.isDirectory(), () => false);
}

/** The whole job, for the library and the command alike. */
async function pullImages(session: Session, request: PullRequest, observe: Observer): Promise<{ results: PullResult[]; transfer: Transfer; plan: Plan }> {
  const { destination } = request;
  const isLayout = typeof destination === "string" && (/[\\/]$/.test(destination) || (await isDirectory(destination)));
  if (typeof destination === "string" && !isLayout) {
    const folder = path.dirname(destination);
    if (!(await isDirectory(folder))) throw new ImgpullError("DISK", `cannot write ${destination}: there is no directory ${folder}`);
    await fs.access(folder, fs.constants.W_OK).catch((error: unknown) => {
      throw diskError(error, `cannot write ${destination}`);
    });
  }
  const sources: TarSource[] = [];
  try {
    for (const file of request.reuse) sources.push(await openTarSource(file));
    const base = request.since === undefined ? undefined : await openTarSource(request.since);
    await base?.handle.close();
    const images = await mapConcurrently(request.images, session.settings.concurrency, async ({ reference, name }) =>
      await resolveImage(session, reference, name, request.isAll));
    const plan = planTar(images, new Set(base?.blobs.keys() ?? []));
    warnOfLayers(session, images);
    if (request.since !== undefined) {
      const bytes = plan.omitted.reduce((sum, { size }) => sum + size, 0);
      session.warn(`left out ${plan.omitted.length} layers (${formatBytes(bytes)}) that ${request.since} holds: load that first. ` +
        "docker's containerd store and ctr --no-unpack take this tar without it, in silence");
    }
    const transfer = await (typeof destination !== "string" ? pullToStream(session, plan, destination, sources, observe)
      : isLayout ? pullToLayout(session, plan, destination, observe)
      : pullToTar(session, plan, await fs.realpath(destination).catch(() => destination), sources, observe));
    const results = images.map(({ name, top, platform, contents }) => ({
      name, digest: top.digest, platform, layers: contents.reduce((sum, { manifest }) => sum + manifest.layers.length, 0),
      sizeBytes: isLayout ? plan.blobBytes : plan.sizeBytes, fetchedBytes: transfer.fetchedBytes,
    }));
    return { results, transfer, plan };
  } finally {
    for (const { handle } of sources) await handle.close();
  }
}

/** Checks a caller's options; what is wrong is named as the option it is. */
function settingsOf(opts: PullerOpts, environment: Environment, certsDirectory = "/etc/docker/certs.d"): Settings {
  const refuse = (reason: string): never => {
    throw new ImgpullError("BAD_OPTION", reason);
  };
  const integer = (value: number | undefined, fallback: number, name: string, minimum: number): number => {
    const given = value ?? fallback;
    return Number.isSafeInteger(given) && given >= minimum ? given : refuse(`${name} must be a whole number from ${minimum} on`);
  };
  const { scheme = "https", tlsCert, tlsKey, caCert, username, password, token, namespace, osType, archType, variant } = opts;
  if (scheme !== "https" && scheme !== "http") refuse(`scheme must be https or http, not "${printable(String(scheme))}"`);
  if ((tlsCert === undefined) !== (tlsKey === undefined)) refuse("a client certificate and its key go together");
  if (password !== undefined && username === undefined) refuse("a password needs a user name");
  if (token !== undefined && username !== undefined) refuse("a token and a user name exclude each other");
  if (namespace !== undefined && !HOST.test(namespace)) refuse(`"${printable(namespace)}" is not a registry's host name`);
  if (token !== undefined && !/^[\x21-\x7e]+$/.test(token)) refuse("the token has characters that no header can carry");
  const given = <T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } =>
    Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined && value !== "")) as never;
  return {
    scheme, environment, certsDirectory, insecure: opts.insecure ?? false,
    timeoutMs: integer(opts.timeoutMs, 30_000, "the timeout", 1),
    concurrency: Math.min(64, integer(opts.concurrency, 8, "concurrency", 1)),
    retries: integer(opts.retries, 5, "retries", 0),
    wanted: given({ os: osType, architecture: archType, variant }),
    ...given({ tlsCert, tlsKey, caCert, username, password, token, namespace }),
  };
}

async function withSession<T>(opts: PullerOpts, run: (session: Session) => Promise<T>, replaced: Partial<Session> = {}): Promise<T> {
  const environment = replaced.environment ?? process.env;
  const settings = replaced.settings ?? settingsOf(opts, environment);
  const transport = createTransport(settings);
  const signal = opts.signal ?? new AbortController().signal;
  try {
    if (signal.aborted) throw new ImgpullError("ABORTED", "stopped", { cause: signal.reason });
    return await run({
      settings, transport, environment, signal, clock: systemClock, challenges: new Map(), credentials: new Map(),
      warn: opts.onWarning ?? (() => undefined), ...replaced,
    });
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

  /** Leaves a verified tar at `dest`, or adds to the OCI image layout there where `dest` is a directory or ends in "/". */
  async pullTar(dest: string): Promise<PullResult> {
    const { onProgress } = this.#opts;
    const name = formatReference(imageName(this.#reference, this.#opts.namespace));
    const images = [{ reference: this.#reference, name }];
    return await withSession(this.#opts, async (session) => {
      const report = progressReporter(onProgress);
      const request = { images, destination: dest, isAll: false, reuse: [] };
      const { results, transfer } = await pullImages(session, request, report);
      report(transfer, undefined, "finish");
      return results[0] as PullResult;
    });
  }

  /** The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no index for it. */
  async pullManifest(type: "list" | "image"): Promise<ManifestHolder> {
    if (type !== "list" && type !== "image") throw new ImgpullError("BAD_OPTION", `a manifest is "list" or "image", not "${printable(String(type))}"`);
    return await withSession(this.#opts, async (session) => {
      if (type === "image") return this.#holder((await resolveImage(session, this.#reference, "", false)).top);
      const fetched = await this.#fetch(session);
      if (parseManifest(fetched, this.#opts.url).kind === "index") return this.#holder(fetched);
      throw new ImgpullError("NOT_FOUND", `${formatReference(this.#reference)} has no list of manifests: it is one image (--manifest image)`);
    });
  }

  /** Whatever the registry has under the reference: an index or an image manifest. */
  async getManifest(): Promise<ManifestHolder> {
    return await withSession(this.#opts, async (session) => {
      const fetched = await this.#fetch(session);
      parseManifest(fetched, this.#opts.url);
      return this.#holder(fetched);
    });
  }

  /** The manifest's descriptor without its bytes, where the registry tells it. `size` is in bytes. */
  async headManifest(): Promise<{ mediaType: string; digest: string; size: number }> {
    return await withSession(this.#opts, async (session) => {
      const head = await new Registry(session, this.#reference).head(this.#tagOrDigest());
      if (head && (this.#reference.digest ?? head.digest) === head.digest) return head;
      const { mediaType, digest, bytes } = await this.#fetch(session);
      return { mediaType, digest, size: bytes.length };
    });
  }

  /** Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept. */
  async pullBlobs(holder: ManifestHolder, dir: string): Promise<void> {
    const bytes = Buffer.from(holder.bytes);
    const manifest = parseManifest({ ...holder, bytes }, holder.imageUrl);
    if (manifest.kind !== "image") throw new ImgpullError("NOT_AN_IMAGE", `${holder.imageUrl}: a list of manifests has no blobs of its own`);
    await withSession(this.#opts, async (session) => {
      const registry = new Registry(session, this.#reference);
      const blobs = new Map([manifest.config, ...manifest.layers].map((descriptor) => [descriptor.digest, descriptor]));
      const jobs = [...blobs.values()].map((descriptor) => newJob(descriptor, registry, 0));
      const report = progressReporter(this.#opts.onProgress);
      try {
        await fs.mkdir(dir, { recursive: true });
        report(await pullToFolder(session, jobs, dir, (digest) => digest.slice(digest.indexOf(":") + 1), report), undefined, "finish");
      } catch (error) {
        throw (error as NodeJS.ErrnoException).syscall ? diskError(error, `cannot write ${dir}`) : error;
      }
    });
  }

  #tagOrDigest(): string {
    return this.#reference.digest ?? (this.#reference.tag as string);
  }

  async #fetch(session: Session): Promise<FetchedManifest> {
    return await new Registry(session, this.#reference).manifest(this.#tagOrDigest());
  }

  #holder({ mediaType, digest, bytes }: FetchedManifest): ManifestHolder {
    return { mediaType, digest, bytes, manifest: JSON.parse(bytes.toString("utf8")), imageUrl: this.#opts.url };
  }
}

/** Turns what happens into Progress; bytes that are fetched again do not make it fall. */
function progressReporter(onProgress: PullerOpts["onProgress"]): Observer & ((transfer: Transfer, finished?: BlobJob, phase?: Progress["phase"]) => void) {
  let doneBytes = 0;
  onProgress?.({ phase: "resolve", doneBytes: 0, totalBytes: 0, blobsDone: 0, blobsTotal: 0 });
  return (transfer: Transfer, _finished?: BlobJob, phase: Progress["phase"] = "fetch"): void => {
    const { jobs, totalBytes } = transfer;
    const sum = jobs.reduce((total, job) => total + job.doneBytes, 0);
    doneBytes = phase === "finish" ? totalBytes : Math.min(totalBytes, Math.max(doneBytes, sum));
    onProgress?.({ phase, doneBytes, totalBytes, blobsDone: jobs.filter((job) => job.isDone).length, blobsTotal: jobs.length });
  };
}

// ====== 14. Looking at a tar ======

async function listTar(_io: CommandIO, file: string): Promise<void> {
  throw new ImgpullError("UNSUPPORTED", `--list-tar ${file}: not there yet`);
}

async function verifyTar(_io: CommandIO, file: string): Promise<void> {
  throw new ImgpullError("UNSUPPORTED", `--verify ${file}: not there yet`);
}

// ====== 15. Command line ======
// One table of options, from which parsing, help, --parsed and the README's table come. stdout is data, stderr is talk. SPEC §1, §8.

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
    { name: "arch", short: "a", value: "ARCH", help: "processor wanted (amd64, arm64, arm …)" },
    { name: "variant", value: "V", help: "processor variant wanted (v7, v8 …)" },
    { name: "platform", value: "OS/ARCH[/V]", help: "the three in one word; all takes every platform" },
    { name: "from", value: "FILE", help: "read more IMAGEs, one a line; - is stdin" },
    { name: "name", value: "NAME", help: "the name that the image gets in the tar" },
    { name: "reuse", value: "TAR", isRepeatable: true, help: "take blobs from a tar that exists (repeatable)" },
    { name: "since", value: "TAR", help: "leave out layers that this tar holds" },
  ]],
  ["Registry", [
    { name: "ns", short: "n", value: "HOST", isForOneHost: true, help: "the registry that a mirror stands for (?ns=HOST)" },
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

function versionText(): string {
  return `imgpull version: ${IMGPULL_VERSION} build date: ${IMGPULL_BUILD_DATE}`;
}

function helpText(): string {
  const row = ({ name, short, value, help }: OptionSpec): string =>
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

function usage(reason: string): ImgpullError {
  return new ImgpullError("BAD_OPTION", `${reason} (imgpull --help)`);
}

/** Levenshtein's distance, to name the option that was meant. */
function editDistance(left: string, right: string): number {
  let row = Array.from({ length: right.length + 1 }, (_, at) => at);
  for (const [at, letter] of [...left].entries()) {
    row = row.reduce<number[]>((next, above, column) => {
      const diagonal = (row[column - 1] ?? 0) + (right[column - 1] === letter ? 0 : 1);
      return [...next, column === 0 ? at + 1 : Math.min(above + 1, (next[column - 1] ?? 0) + 1, diagonal)];
    }, []);
  }
  return row[right.length] ?? 0;
}

interface CommandLine {
  readonly values: Readonly<Record<string, string>>;
  readonly switches: ReadonlySet<string>;
  readonly reuse: readonly string[];
  readonly positionals: readonly string[];
}

function parseCommandLine(argv: readonly string[]): CommandLine {
  const options = Object.fromEntries([...OPTIONS, { name: "ca", value: "FILE" } as OptionSpec].map(({ name, short, value }) =>
    [name, { type: value ? "string" : "boolean", ...(short ? { short } : {}) } as const]));
  const { tokens } = parseArgs({ args: [...argv], options, strict: false, allowPositionals: true, tokens: true });
  const values: Record<string, string> = {};
  const switches = new Set<string>();
  const reuse: string[] = [];
  const positionals: string[] = [];
  for (const token of tokens) {
    if (token.kind === "positional") positionals.push(token.value);
    if (token.kind !== "option") continue;
    const name = token.name === "ca" ? "cacert" : token.name;
    const spec = OPTIONS.find((option) => option.name === name);
    if (!spec) {
      const [nearest] = OPTIONS.map((option) => ({ name: option.name, distance: editDistance(name, option.name) }))
        .filter(({ name: other, distance }) => distance <= 2 || (name.length > 2 && other.startsWith(name)))
        .sort((left, right) => left.distance - right.distance);
      const hint = nearest ? `: did you mean --${nearest.name}?` : "";
      throw usage(`unknown option ${printable(token.rawName, 60)}${hint}`);
    }
    if (!spec.value) {
      if (token.value !== undefined) throw usage(`${token.rawName} takes no value`);
      if (switches.has(name)) throw usage(`--${name} is given twice`);
      switches.add(name);
      continue;
    }
    const isShort = !token.rawName.startsWith("--");
    const value = isShort && token.inlineValue ? token.value?.replace(/^=/, "") : token.value;
    if (value === undefined || value === "" || (!token.inlineValue && value.startsWith("-") && value !== "-")) {
      throw usage(`${token.rawName} needs a value (${spec.value})`);
    }
    if (values[name] !== undefined) throw usage(`--${name} is given twice`);
    if (spec.isRepeatable) reuse.push(value);
    else values[name] = value;
  }
  return { values, switches, reuse, positionals };
}

/** The command line in the words of the library, checked as far as that goes without reading anything. */
function planCommand({ values, switches, reuse, positionals }: CommandLine) {
  const { platform } = values;
  if (platform !== undefined && (values.os ?? values.arch ?? values.variant) !== undefined) {
    throw usage("--platform excludes --os, --arch and --variant");
  }
  const [osType, archType, variant, ...rest] = platform === undefined || platform === "all" ? [values.os, values.arch, values.variant] : platform.split("/");
  const isPlatform = platform === undefined || platform === "all" || (osType && archType && variant !== "" && rest.length === 0);
  if (!isPlatform) throw usage(`--platform is OS/ARCH, OS/ARCH/VARIANT or all, not "${printable(platform)}"`);
  const choice = (name: string, choices: string[]): string | undefined => {
    const value = values[name];
    if (value === undefined || choices.includes(value)) return value;
    throw usage(`--${name} is ${choices.join(" or ")}, not "${printable(value)}"`);
  };
  const number = (name: string, minimum: number, maximum: number, isWhole = true): number | undefined => {
    const value = values[name];
    if (value === undefined) return undefined;
    const parsed = /^\d+(\.\d+)?$/.test(value) ? Number(value) : Number.NaN;
    if (parsed >= minimum && parsed <= maximum && (!isWhole || Number.isInteger(parsed))) return parsed;
    throw usage(`--${name} is a ${isWhole ? "whole " : ""}number from ${minimum} to ${maximum}, not "${printable(value)}"`);
  };
  const { user: username, token, password, cert: tlsCert, key: tlsKey, cacert: caCert, ns: namespace, from, name, since } = values;
  const isPasswordOnStdin = switches.has("password-stdin");
  if (username !== undefined && password === undefined && !isPasswordOnStdin) throw usage("--user needs --password or --password-stdin");
  if (password !== undefined && isPasswordOnStdin) throw usage("--password and --password-stdin exclude each other");
  if ((password !== undefined || isPasswordOnStdin) && username === undefined) throw usage("--password needs --user");
  if (token !== undefined && username !== undefined) throw usage("--token and --user exclude each other");
  if (isPasswordOnStdin && from === "-") throw usage("stdin is asked for twice: --password-stdin and --from -");
  if ((tlsCert === undefined) !== (tlsKey === undefined)) throw usage("--cert and --key go together");
  const timeout = number("timeout", 0.001, 86_400, false);
  const opts: Record<string, unknown> = {
    scheme: choice("scheme", ["https", "http"]), osType, archType, variant, username, password, token, tlsCert, tlsKey, caCert,
    insecure: switches.has("insecure") || undefined, namespace, concurrency: number("concurrency", 1, 64),
    retries: number("retries", 0, 100), timeoutMs: timeout === undefined ? undefined : Math.ceil(timeout * 1000),
  };
  for (const key of Object.keys(opts)) if (opts[key] === undefined) delete opts[key];
  const manifest = choice("manifest", ["list", "image"]) as "list" | "image" | undefined;
  const isLooking = values["list-tar"] !== undefined || values.verify !== undefined;
  const hasDestination = manifest === undefined && (from !== undefined ? positionals.length > 0 : positionals.length > 1);
  const destination = hasDestination ? positionals.at(-1) : undefined;
  const images = manifest !== undefined ? positionals.slice(0, 1) : hasDestination ? positionals.slice(0, -1) : [...positionals];
  if (!isLooking && images.length === 0 && from === undefined) throw usage("IMAGE is missing");
  if (!isLooking && from !== undefined && destination === undefined) throw usage("DEST is missing");
  if (isLooking && positionals.length > 0) throw usage("--list-tar and --verify take no IMAGE");
  if (name !== undefined && (images.length !== 1 || from !== undefined)) throw usage("--name goes with one IMAGE");
  return { opts, images, destination, manifest, from, name, since, reuse, isAll: platform === "all", isPasswordOnStdin,
    isQuiet: switches.has("quiet"), given: new Set(Object.keys(values)) };
}

/** `imgpull alpine:3 busybox:1` means two images, not a file called busybox:1. */
function checkDestinationName(destination: string): void {
  if (/[\\/]|\.(tar|oci|img|tgz|zip|gz)$/i.test(destination) || !/[:@]/.test(destination)) return;
  try {
    parseReference(destination);
  } catch {
    return;
  }
  throw usage(`DEST is missing: "${destination}" reads as an IMAGE; say ./${destination} to mean a file`);
}

/** The streams and signals that a command runs with; tests give their own. */
interface CommandIO {
  readonly stdin: NodeJS.ReadableStream;
  readonly stdout: NodeJS.WritableStream & { isTTY?: boolean; columns?: number };
  readonly stderr: NodeJS.WritableStream & { isTTY?: boolean; columns?: number };
  readonly environment: Environment;
}

async function readStdin(io: CommandIO): Promise<string> {
  const chunks: Buffer[] = [];
  for await (const chunk of io.stdin) chunks.push(Buffer.from(chunk as Uint8Array));
  return Buffer.concat(chunks).toString("utf8");
}

/** Progress on stderr: redrawn in place on a terminal, a plain line for each blob and every ten seconds elsewhere. */
function showProgress(io: CommandIO, isQuiet: boolean) {
  const { stderr } = io;
  const isLive = stderr.isTTY === true && !isQuiet && io.environment.TERM !== "dumb";
  const dim = (text: string): string => (io.environment.NO_COLOR || !isLive ? text : `\u001b[2m${text}\u001b[22m`);
  let drawnLines = 0;
  let latest: Transfer | undefined;
  const startedAtMs = performance.now();
  const clear = (): void => {
    if (drawnLines > 0) stderr.write(`\u001b[${drawnLines}A\r\u001b[J`); // up, to the line's start, erase below
    drawnLines = 0;
  };
  const total = ({ jobs, totalBytes, fetchedBytes }: Transfer): string => {
    const doneBytes = jobs.reduce((sum, job) => sum + job.doneBytes, 0);
    const rate = fetchedBytes / Math.max(0.001, (performance.now() - startedAtMs) / 1000);
    const left = rate > 0 ? `, ${Math.ceil((totalBytes - doneBytes) / rate)} s left` : "";
    return `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${formatBytes(rate)}/s${left}`;
  };
  const draw = (): void => {
    if (!latest) return;
    if (!isLive) return void stderr.write(`imgpull: ${total(latest)}\n`);
    const width = Math.max(20, (stderr.columns ?? 80) - 1);
    const moving = [...new Set([...latest.active].map(({ job }) => job))].slice(0, 12);
    const line = ({ descriptor: { digest, size }, doneBytes }: BlobJob): string => {
      const label = `${digest.split(":")[1]?.slice(0, 12)} ${formatBytes(doneBytes)}/${formatBytes(size)} `;
      const room = Math.min(30, width - label.length - 2);
      const filled = Math.round((room * doneBytes) / Math.max(1, size));
      return room < 5 ? label : `${label}[${"#".repeat(filled)}${" ".repeat(room - filled)}]`;
    };
    clear();
    const lines = [...moving.map((job) => dim(line(job).slice(0, width))), total(latest).slice(0, width)];
    stderr.write(lines.map((each) => `${each}\n`).join(""));
    drawnLines = lines.length;
  };
  const timer = isQuiet ? undefined : setInterval(draw, isLive ? 100 : 10_000);
  timer?.unref();
  return {
    observe: (transfer: Transfer, finished?: BlobJob): void => {
      latest = transfer;
      if (!finished || isQuiet || isLive) return;
      const { digest, size } = finished.descriptor;
      stderr.write(`imgpull: ${digest.slice(0, 19)} ${formatBytes(size)} done\n`);
    },
    say: (text: string): void => {
      clear();
      stderr.write(`imgpull: ${text}\n`);
    },
    stop: (): void => {
      clearInterval(timer);
      clear();
      latest = undefined;
    },
    seconds: (): string => ((performance.now() - startedAtMs) / 1000).toFixed(1),
  };
}

/** The images of the command line and of --from, each once, with the names they get. */
async function listImages(io: CommandIO, command: ReturnType<typeof planCommand>): Promise<PullRequest["images"]> {
  const texts = [...command.images];
  if (command.from !== undefined) {
    const list = command.from === "-" ? await readStdin(io) : await fs.readFile(command.from, "utf8").catch((error: unknown) => {
      throw new ImgpullError("BAD_OPTION", `cannot read --from ${command.from}: ${DISK_WORDS[errorCodeOf(error)] ?? "unreadable"}`);
    });
    texts.push(...list.split(/\r?\n/).map((line) => line.replace(/(^|\s)#.*$/, "").trim()).filter(Boolean));
  }
  if (texts.length === 0) throw usage("no IMAGE is given");
  const problems: unknown[] = [];
  const references = texts.flatMap((text) => {
    try {
      return [parseReference(text)];
    } catch (error) {
      problems.push(error);
      return [];
    }
  });
  if (problems.length > 0) throw joinErrors(problems);
  const unique = new Map(references.map((reference) => [formatReference(reference), reference]));
  const images = [...unique.values()].map((reference) => {
    const named = command.name === undefined ? imageName(reference, command.opts.namespace as string | undefined) : parseReference(command.name);
    return { reference, name: formatReference(named) };
  });
  const names = images.map(({ name }) => name);
  const doubled = names.find((name, at) => names.indexOf(name) !== at);
  if (doubled !== undefined) throw usage(`two IMAGEs would have the name ${doubled} in the tar`);
  const hosts = new Set(references.map(({ host }) => host));
  const bound = OPTIONS.find(({ name, isForOneHost }) => isForOneHost && command.given.has(name));
  if (hosts.size > 1 && bound) throw usage(`--${bound.name} belongs to one registry, and the IMAGEs are on ${[...hosts].join(", ")}`);
  return images;
}

async function printManifest(io: CommandIO, opts: PullerOpts, type: "list" | "image"): Promise<void> {
  const { bytes, digest, manifest } = await new Puller(opts).pullManifest(type);
  io.stdout.write(io.stdout.isTTY ? `${JSON.stringify(manifest, null, 2)}\n` : bytes);
  io.stderr.write(`${digest}\n`);
}

async function runCommand(argv: readonly string[], io: CommandIO, signal: AbortSignal): Promise<void> {
  const line = parseCommandLine(argv);
  if (line.switches.has("help")) return void io.stdout.write(helpText());
  if (line.switches.has("version")) return void io.stdout.write(`${versionText()}\n`);
  const command = planCommand(line);
  if (line.switches.has("parsed")) {
    const hide = (values: object): object =>
      Object.fromEntries(Object.entries(values).map(([key, value]) => [key, OPTIONS.some(({ name, isSecret }) => isSecret && name === key) ? "***" : value]));
    const { opts, given: _given, ...rest } = command;
    return void io.stdout.write(`${JSON.stringify({ ...rest, ...hide(opts) }, null, 2)}\n`);
  }
  if (line.values["list-tar"] !== undefined) return await listTar(io, line.values["list-tar"]);
  if (line.values.verify !== undefined) return await verifyTar(io, line.values.verify);
  const images = await listImages(io, command);
  const [first] = images as [PullRequest["images"][number]];
  const destination = command.destination ?? defaultDestination(first.reference);
  if (command.destination !== undefined) checkDestinationName(destination);
  const password = command.isPasswordOnStdin ? { password: (await readStdin(io)).replace(/\r?\n$/, "") } : {};
  const progress = showProgress(io, command.isQuiet);
  const opts: PullerOpts = { ...command.opts, ...password, url: formatReference(first.reference), signal, onWarning: progress.say };
  if (command.manifest !== undefined) {
    progress.stop();
    return await printManifest(io, opts, command.manifest);
  }
  const isStream = destination === "-";
  if (isStream && io.stdout.isTTY) throw usage("the tar is not written to a terminal: redirect stdout");
  try {
    await withSession(opts, async (session) => {
      const { isAll, reuse, since } = command;
      const request = { images, destination: isStream ? io.stdout : destination, isAll, reuse, ...(since === undefined ? {} : { since }) };
      const { results, transfer, plan } = await pullImages(session, request, progress.observe);
      progress.stop();
      const pinned = images.map(({ reference }, at) => formatReference({ ...reference, digest: results[at]?.digest as string }));
      if (!isStream) io.stdout.write(pinned.map((each) => `${each}\n`).join(""));
      if (command.isQuiet) return;
      const { reusedBytes, resumedBytes, fetchedBytes } = transfer;
      const parts = [`${formatBytes(fetchedBytes)} fetched`, reusedBytes > 0 ? `${formatBytes(reusedBytes)} reused` : "",
        resumedBytes > 0 ? `${formatBytes(resumedBytes)} resumed` : ""].filter(Boolean);
      const count = images.length === 1 ? "1 image" : `${images.length} images`;
      progress.say(`${count}, ${formatBytes(plan.sizeBytes)} in ${isStream ? "the stream" : destination}: ${parts.join(", ")}, ${progress.seconds()} s`);
    }, { environment: io.environment });
  } finally {
    progress.stop();
  }
}

/** Runs the command; resolves to its exit code. 0 done, 1 failed, 2 usage, 130 SIGINT, 143 SIGTERM. */
async function main(argv: readonly string[], given?: CommandIO): Promise<number> {
  const { stdin, stdout, stderr, env: environment } = process;
  const io: CommandIO = given ?? { stdin, stdout, stderr, environment };
  const stop = new AbortController();
  let signalCode = 0;
  const interrupt = (name: NodeJS.Signals): void => {
    if (signalCode !== 0) process.exit(signalCode); // asked twice: at once
    signalCode = name === "SIGINT" ? 130 : 143;
    stop.abort();
  };
  const signals: NodeJS.Signals[] = given ? [] : ["SIGINT", "SIGTERM"];
  for (const name of signals) process.on(name, interrupt);
  try {
    await runCommand(argv, io, stop.signal);
    return 0;
  } catch (error) {
    if (signalCode !== 0) return signalCode;
    if (!(error instanceof ImgpullError)) throw error;
    if (errorCodeOf(error.cause) !== "EPIPE") io.stderr.write(`imgpull: ${error.message}\n`);
    return error.code === "BAD_REFERENCE" || error.code === "BAD_OPTION" ? 2 : 1;
  } finally {
    for (const name of signals) process.off(name, interrupt);
  }
}

// ====== 16. Exports ======

/** @internal for the tests */
const internals = Object.freeze({
  LIMITS, parseReference, formatReference, imageName, defaultDestination, apiHost, isExemptFromProxy, proxyFor, redactUrl, printable,
  systemCertificates, parseRetryAfter, retryDelayMs, isRetriable, parseChallenges, normalizeAuthKey, matchPlatform, wantedPlatform,
  hostPlatform, acceptableVariants, parseManifest, encodeTarHeader, planTar, readTar, digestInName, addRange, missingRanges,
  settingsOf, withSession, pullImages, resolveImage, findCredential, parseCommandLine, planCommand, helpText, editDistance, formatBytes,
  OPTIONS,
});

export { ImgpullError, Puller, newPullerOpts, main, internals };
export type { Descriptor, ErrorCode, ManifestHolder, Platform, Progress, PullerOpts, PullResult };
