// A registry on loopback over real sockets, with a token service and a storage server of its own,
// which does what a test tells it: faults are chosen by request, by times and by position, never by
// the clock.
import { once } from "node:events";
import { readFileSync } from "node:fs";
import {
  createServer,
  type IncomingHttpHeaders,
  type IncomingMessage,
  type ServerResponse,
} from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo, Server, Socket } from "node:net";
import type { TLSSocket } from "node:tls";
import { gzipSync } from "node:zlib";
import { SECRETS, type TestScope, USER } from "./command.ts";
import { type ManifestBytes, MEDIA, type TestContent } from "./image.ts";

// ====== Options ======

export interface TlsOptions {
  key: string;
  cert: string;
  /** PEM of the CA whose clients alone may connect (mTLS). */
  clientCa?: string;
  /** Asks for a client certificate, and goes on without. */
  clientOptional?: boolean;
}

export interface AuthOptions {
  mode: "none" | "basic" | "bearer";
  /** Default USER and SECRETS.password. */
  user?: string;
  password?: string;
  /** Taken as `Authorization: Basic <this>`, in both modes, without a handshake (ECR). */
  outsideToken?: string;
  /**
   * Bearer: without credentials one gets a token (default), or 401, or a token that opens nothing.
   */
  anonymous?: "welcome" | "refused" | "useless";
  /**
   * Bearer: the token service is the registry's own (default), or a second server, of the same
   * scheme or http.
   */
  tokenServer?: "same" | "second" | "second-http";
  /**
   * Bearer: the realm as it stands in the challenge (`/token?account=me`); default the token
   * service's URL.
   */
  realm?: string;
  /**
   * Bearer: null leaves them out of the challenge; default service "test-registry", scope
   * `repository:NAME:pull`.
   */
  service?: string | null;
  scope?: string | null;
  /**
   * The WWW-Authenticate headers in place of the usual one, which is given: one header line for
   * each string.
   */
  challenge?: (usual: string, repository: string) => string[];
  tokenField?: "token" | "access_token" | "both";
  /** As it stands in the answer; absent by default. */
  expiresIn?: unknown;
  /** Further fields of the answer: `issued_at`, `refresh_token` … */
  tokenFields?: Record<string, unknown>;
  /** Each token is good for so many requests. */
  tokenUses?: number;
  /** Status for a token that is no longer good; default 401, ECR Public has 400. */
  staleStatus?: number;
  /**
   * Status of the token service for wrong credentials or identity tokens; default 401, GHCR has
   * 403.
   */
  refusedStatus?: number;
  /** Taken as refresh_token; default SECRETS.identityToken. */
  identityToken?: string;
  /** Status of every POST to the token service, instead of serving it (404, 405 …). */
  postStatus?: number;
}

export interface StorageOptions {
  /** Default: as the registry. false: plain http (an https registry that redirects down). */
  tls?: TlsOptions | false;
  /** 400 for a request with Authorization, as S3 and Azure do; default true. */
  refuseAuthorization?: boolean;
  /** A signed URL serves one request, then 403. */
  singleUse?: boolean;
  /** 401 with this WWW-Authenticate for a request without Authorization. */
  challenge?: string;
}

export interface RegistryOptions {
  port?: number;
  tls?: TlsOptions;
  auth?: AuthOptions | "none" | "basic" | "bearer";
  storage?: StorageOptions;
  /** Blobs and manifests have an ETag, and If-Range is honoured; default false. */
  etag?: boolean;
  /** It has the referrers endpoint, with so many entries a page; default: it has none. */
  referrersPage?: number;
  /** A path before the repository's name that is taken off, as on a mirror: `quay.io/`. */
  prefix?: string;
}

// ====== Requests and faults ======

/** "layer" and "config" are the two kinds of blob; "storage" is any request for a signed URL. */
export type RequestKind = "ping" | "manifest" | "layer" | "config" | "token" | "storage" | "other";

export interface RequestRecord {
  server: "registry" | "storage" | "token";
  kind: RequestKind;
  method: string;
  /** Path and query as they came. */
  url: string;
  path: string;
  query: URLSearchParams;
  headers: IncomingHttpHeaders;
  /** Body of a POST. */
  body: string;
  repository: string;
  /** Tag or digest asked for; and the digest of what it names, if it is there. */
  reference: string;
  digest: string | undefined;
  range: string | undefined;
  /** 0: the connection ended before any status. */
  status: number;
  /**
   * Body bytes handed to the socket. The system's buffers may hold some of them when the client
   * goes away.
   */
  bytesSent: number;
  /** Number of the TCP connection, counted over all servers from 1. */
  connection: number;
  /** Common name of the client's certificate. */
  clientCertificate: string | undefined;
}

export interface Matcher {
  /** "blob" is "layer" or "config". */
  kind?: RequestKind | "blob";
  method?: string;
  repository?: string;
  /** Digest of the content, also where it was asked for by tag or by a signed URL. */
  digest?: string;
  /** The reference as it was asked for. */
  tag?: string;
  path?: string | RegExp;
  /** true: only requests with a Range header; false: only those without. */
  ranged?: boolean;
  where?: (request: RequestRecord) => boolean;
  /** Lets so many matching requests pass first; then holds for so many (default: all). */
  skip?: number;
  times?: number;
  /**
   * Also requests that lack credentials; otherwise those get their challenge and are not counted.
   */
  beforeAuth?: boolean;
}

/**
 * What happens to an answer. Fields combine where that makes sense. A fault with a position beyond
 * the answer's body (`dropAfter`, `dropAt`, `stallAfter`, `corruptAt`, `pause`) leaves that answer
 * alone and does not count it.
 */
export interface Fault {
  /** Nothing is answered before this settles. */
  wait?: Promise<unknown>;
  /** The connection is reset (over TLS at least closed) before any header. */
  reset?: true;
  /**
   * A whole answer of the test's own; status alone has an error in the registries' JSON as its
   * body.
   */
  status?: number;
  /** Alone or with headers: in place of the content, ranges and all. */
  body?: string | Buffer;
  /** Laid over the answer's headers; null removes one, an array gives several lines. */
  headers?: Record<string, string | string[] | null>;
  /**
   * "storage": a signed URL there; "self": one on this server, as a relative Location; else the
   * Location.
   */
  redirect?: "storage" | "self" | (string & {}) | ((request: RequestRecord) => string);
  /** Status of the redirect, default 307. */
  redirectStatus?: number;
  /**
   * The connection is closed after so many body bytes of this answer; or where the content's byte N
   * would come.
   */
  dropAfter?: number;
  dropAt?: number;
  /** Nothing more comes after so many body bytes of this answer. */
  stallAfter?: number;
  pause?: { after: number; until: Promise<unknown> };
  /** The content's byte N is flipped, counted from the content's start, whatever the range. */
  corruptAt?: number;
  /**
   * Lie about the length by so many bytes (all bytes are sent, then the connection is closed); or
   * do not tell it.
   */
  contentLength?: number | "chunked" | "close";
  /** 200 with the whole content. */
  ignoreRange?: true;
  contentEncoding?: "gzip";
  /** All else; `next` gives the usual answer, with the rest of this fault. */
  handler?: (
    request: IncomingMessage,
    response: ServerResponse,
    next: () => Promise<void>,
  ) => void | Promise<void>;
}

export interface Rule {
  /**
   * Answers that it has changed. A test should check it: a fault that never came proves nothing.
   */
  readonly hits: number;
  /**
   * The first request on which the fault has taken effect (has dropped, stalled, paused, or begun
   * to answer).
   */
  readonly reached: Promise<RequestRecord>;
  remove(): void;
}

export interface Gate {
  promise: Promise<void>;
  open: () => void;
}

export function gate(): Gate {
  let open = () => {};
  const promise = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { promise, open };
}

// ====== Parts ======

interface Repository {
  tags: Map<string, string>;
  manifests: Map<string, ManifestBytes>;
  blobs: Map<string, Buffer>;
  configs: Set<string>;
}

interface Content {
  bytes: Buffer;
  mediaType: string;
  digest: string;
  manifest: boolean;
}

type Headers = Record<string, string | string[]>;

interface Answer {
  status: number;
  headers: Headers;
  body: Buffer;
  /** Where in the content the body begins. */
  start: number;
}

interface ActiveRule {
  matcher: Matcher;
  fault: Fault;
  seen: number;
  hits: number;
  reached: (request: RequestRecord) => void;
}

interface Token {
  repositories: Set<string>;
  usesLeft: number;
}

function failure(status: number, code: string, message: string, headers: Headers = {}): Answer {
  const body = Buffer.from(`${JSON.stringify({ errors: [{ code, message }] })}\n`);
  return { status, headers: { "content-type": "application/json", ...headers }, body, start: 0 };
}

function json(body: Buffer): Answer {
  return { status: 200, headers: { "content-type": "application/json" }, body, start: 0 };
}

/** RFC 9110 14.2, one range only; what is not understood is ignored, as it has to be. */
function parseRange(
  range: string | undefined,
  sizeBytes: number,
): { start: number; end: number } | "bad" | undefined {
  const match = /^bytes=(\d*)-(\d*)$/.exec(range ?? "");
  if (!match || (match[1] === "" && match[2] === "")) return undefined;
  if (match[1] === "") return { start: Math.max(0, sizeBytes - Number(match[2])), end: sizeBytes };
  const start = Number(match[1]);
  const end = match[2] === "" ? sizeBytes : Math.min(sizeBytes, Number(match[2]) + 1);
  return start >= sizeBytes || end <= start ? "bad" : { start, end };
}

function contentAnswer(
  content: Content,
  request: RequestRecord,
  fault: Fault,
  etag: boolean,
): Answer {
  const { bytes, digest } = content;
  const headers: Headers = {
    "content-type": content.mediaType,
    "docker-content-digest": digest,
    ...(etag && { etag: `"${digest}"` }),
    ...(!content.manifest && { "accept-ranges": "bytes" }),
  };
  const ifRange = request.headers["if-range"];
  const ranged =
    !content.manifest && !fault.ignoreRange && (ifRange === undefined || ifRange === headers.etag);
  const range = ranged ? parseRange(request.range, bytes.length) : undefined;
  if (range === undefined) return { status: 200, headers, body: bytes, start: 0 };
  if (range === "bad") {
    return failure(416, "RANGE_INVALID", "range not satisfiable", {
      "content-range": `bytes */${bytes.length}`,
    });
  }
  headers["content-range"] = `bytes ${range.start}-${range.end - 1}/${bytes.length}`;
  return { status: 206, headers, body: bytes.subarray(range.start, range.end), start: range.start };
}

/** Whether the fault's position lies within this answer. */
function reaches(fault: Fault, answer: Answer, method: string): boolean {
  const {
    start,
    body: { length },
  } = answer;
  const inContent = [fault.corruptAt, fault.dropAt].filter((at) => at !== undefined);
  const inBody = [fault.dropAfter, fault.stallAfter, fault.pause?.after].filter(
    (at) => at !== undefined,
  );
  if (method === "HEAD" && inContent.length + inBody.length > 0) return false;
  return (
    inContent.every((at) => at >= start && at < start + length) && inBody.every((at) => at < length)
  );
}

function spoil(answer: Answer, fault: Fault, request: RequestRecord): Answer {
  let { body, headers } = answer;
  if (fault.corruptAt !== undefined) {
    body = Buffer.from(body);
    const at = fault.corruptAt - answer.start;
    body[at] = (body[at] ?? 0) ^ 0xff;
  }
  if (fault.contentEncoding) {
    body = gzipSync(body);
    headers = { ...headers, "content-encoding": "gzip" };
  }
  const length =
    typeof fault.contentLength === "string"
      ? null
      : String(body.length + (fault.contentLength ?? 0));
  const laid: Record<string, string | string[] | null> = {
    "content-length": length,
    ...headers,
    ...fault.headers,
  };
  const kept = Object.entries(laid).filter(
    (entry): entry is [string, string | string[]] => entry[1] !== null,
  );
  if (request.method === "HEAD") body = Buffer.alloc(0);
  return { ...answer, body, headers: Object.fromEntries(kept) };
}

function gone(response: ServerResponse): Promise<void> {
  return new Promise((done) => {
    if (response.destroyed) done();
    else response.once("close", () => done());
  });
}

async function flushed(response: ServerResponse): Promise<void> {
  const { socket } = response;
  if (socket && !socket.destroyed)
    await new Promise<void>((done) => {
      socket.write("", () => done());
    });
}

async function writeBody(
  response: ServerResponse,
  body: Buffer,
  record: RequestRecord,
): Promise<void> {
  for (let at = 0; at < body.length && !response.destroyed; at += 65536) {
    const chunk = body.subarray(at, at + 65536);
    record.bytesSent += chunk.length;
    if (response.write(chunk)) continue;
    await new Promise<void>((done) => {
      const settle = () => {
        response.off("drain", settle).off("close", settle);
        done();
      };
      response.on("drain", settle).on("close", settle);
    });
  }
}

async function send(
  response: ServerResponse,
  answer: Answer,
  fault: Fault,
  record: RequestRecord,
  reached: () => void,
): Promise<void> {
  if (response.destroyed) return;
  record.status = answer.status;
  if (fault.contentLength === "close") response.useChunkedEncodingByDefault = false;
  response.writeHead(answer.status, answer.headers);
  const { body } = answer;
  const dropAfter =
    fault.dropAfter ?? (fault.dropAt === undefined ? undefined : fault.dropAt - answer.start);
  const stop = dropAfter ?? fault.stallAfter ?? body.length;
  if (fault.pause) {
    await writeBody(response, body.subarray(0, fault.pause.after), record);
    await flushed(response);
    reached();
    await Promise.race([fault.pause.until, gone(response)]);
  }
  await writeBody(response, body.subarray(fault.pause?.after ?? 0, stop), record);
  if (
    dropAfter === undefined &&
    fault.stallAfter === undefined &&
    fault.contentLength === undefined
  ) {
    reached();
    response.end();
    return;
  }
  response.flushHeaders();
  await flushed(response);
  reached();
  if (dropAfter !== undefined) response.socket?.destroy();
  else if (fault.stallAfter !== undefined) await gone(response);
  else if (typeof fault.contentLength === "number") response.socket?.destroy();
  else response.end();
}

// ====== Registry ======

class Listener {
  url = "";
  host = "";
  connections = 0;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #byPort = new Map<number, { number: number; socket: Socket }>();

  constructor(
    tls: TlsOptions | undefined,
    nextConnection: () => number,
    answer: (request: IncomingMessage, response: ServerResponse) => void,
  ) {
    const limits = { keepAliveTimeout: 0, requestTimeout: 0, headersTimeout: 0 };
    const server = tls
      ? createTlsServer(
          {
            ...limits,
            key: tls.key,
            cert: tls.cert,
            ...(tls.clientCa !== undefined && {
              ca: tls.clientCa,
              requestCert: true,
              rejectUnauthorized: tls.clientOptional !== true,
            }),
          },
          answer,
        )
      : createServer(limits, answer);
    server.on("connection", (socket: Socket) => {
      this.connections += 1;
      this.#sockets.add(socket);
      this.#byPort.set(socket.remotePort ?? 0, { number: nextConnection(), socket });
      socket.on("error", () => {}).once("close", () => this.#sockets.delete(socket));
    });
    // A client that refuses the certificate, or goes away within the handshake, is part of the
    // tests.
    server.on("tlsClientError", () => {}).on("clientError", (_error, socket) => socket.destroy());
    this.#server = server;
  }

  async listen(port: number, scheme: string): Promise<void> {
    this.#server.listen(port, "127.0.0.1");
    await once(this.#server, "listening");
    this.host = `127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
    this.url = `${scheme}://${this.host}`;
  }

  connectionOf(request: IncomingMessage): { number: number; socket: Socket } | undefined {
    return this.#byPort.get(request.socket.remotePort ?? 0);
  }

  async close(): Promise<void> {
    const closed = new Promise<void>((done) => {
      this.#server.close(() => done());
    });
    this.disconnect();
    await closed;
  }

  disconnect(): void {
    for (const socket of this.#sockets) socket.destroy();
  }
}

export class Registry {
  readonly requests: RequestRecord[] = [];
  readonly #repositories = new Map<string, Repository>();
  readonly #rules: ActiveRule[] = [];
  readonly #tokens = new Map<string, Token>();
  readonly #signatures = new Map<string, { usesLeft: number }>();
  readonly #listeners = new Map<RequestRecord["server"], Listener>();
  readonly #watchers = new Set<() => void>();
  readonly #running = new Set<Promise<void>>();
  readonly #options: RegistryOptions;
  readonly #auth: AuthOptions;
  #connections = 0;
  #issued = 0;

  private constructor(options: RegistryOptions) {
    this.#options = options;
    this.#auth = typeof options.auth === "object" ? options.auth : { mode: options.auth ?? "none" };
  }

  /** @internal Use startRegistry(). */
  static async start(options: RegistryOptions): Promise<Registry> {
    const registry = new Registry(options);
    const { tls } = options;
    await registry.#listen("registry", tls, options.port);
    const storageTls = options.storage?.tls;
    await registry.#listen("storage", storageTls === false ? undefined : (storageTls ?? tls));
    const { tokenServer = "same" } = registry.#auth;
    if (tokenServer !== "same")
      await registry.#listen("token", tokenServer === "second" ? tls : undefined);
    return registry;
  }

  async #listen(
    name: RequestRecord["server"],
    tls: TlsOptions | undefined,
    port = 0,
  ): Promise<void> {
    const listener = new Listener(
      tls,
      () => (this.#connections += 1),
      (request, response) => {
        const running = this.#answer(name, request, response).catch((error: unknown) => {
          // A mistake in a test's own handler must not look like a network fault.
          console.error(error);
          process.exitCode = 1;
          response.destroy();
        });
        this.#running.add(running);
        void running.then(() => this.#running.delete(running));
      },
    );
    await listener.listen(port, tls ? "https" : "http");
    this.#listeners.set(name, listener);
  }

  #listener(name: RequestRecord["server"]): Listener {
    return this.#listeners.get(name) ?? (this.#listeners.get("registry") as Listener);
  }

  /** `127.0.0.1:PORT`, as it stands in a reference. */
  get host(): string {
    return this.#listener("registry").host;
  }
  get url(): string {
    return this.#listener("registry").url;
  }
  get storageUrl(): string {
    return this.#listener("storage").url;
  }
  get tokenUrl(): string {
    return `${this.#listener("token").url}/token`;
  }

  /** TCP connections accepted so far, by one server or by all. */
  connections(server?: RequestRecord["server"]): number {
    return server ? (this.#listeners.get(server)?.connections ?? 0) : this.#connections;
  }

  // ------ Content ------

  #repository(name: string): Repository {
    const known = this.#repositories.get(name);
    if (known) return known;
    const made: Repository = {
      tags: new Map(),
      manifests: new Map(),
      blobs: new Map(),
      configs: new Set(),
    };
    this.#repositories.set(name, made);
    return made;
  }

  /**
   * Serves the content and all below it; returns its reference with the host, by tag or (without
   * one) by digest.
   */
  add(
    content: TestContent,
    repository: string,
    tag?: string,
    options: { without?: string[] } = {},
  ): string {
    const held = this.#repository(repository);
    for (const [digest, manifest] of content.manifests) held.manifests.set(digest, manifest);
    for (const [digest, bytes] of content.blobs) held.blobs.set(digest, bytes);
    for (const digest of content.configs) held.configs.add(digest);
    for (const digest of options.without ?? []) this.remove(repository, digest);
    if (tag !== undefined) held.tags.set(tag, content.digest);
    return `${this.host}/${this.#fullName(repository)}${tag === undefined ? `@${content.digest}` : `:${tag}`}`;
  }

  /** Takes away a tag, or the manifest or blob with this digest. */
  remove(repository: string, reference: string): void {
    const { tags, manifests, blobs } = this.#repository(repository);
    for (const held of [tags, manifests, blobs]) held.delete(reference);
  }

  /** Serves other bytes under a digest, right or wrong. */
  putBlob(repository: string, digest: string, bytes: Buffer): void {
    this.#repository(repository).blobs.set(digest, bytes);
  }

  #find(request: RequestRecord): Content | undefined {
    const { reference, kind } = request;
    const anywhere = kind === "storage";
    for (const [name, { tags, manifests, blobs }] of this.#repositories) {
      if (!anywhere && name !== request.repository) continue;
      const digest = tags.get(reference) ?? reference;
      const manifest = kind === "manifest" || anywhere ? manifests.get(digest) : undefined;
      if (manifest) return { ...manifest, digest, manifest: true };
      const bytes = kind !== "manifest" ? blobs.get(digest) : undefined;
      if (bytes) return { bytes, digest, mediaType: "application/octet-stream", manifest: false };
    }
    return undefined;
  }

  // ------ Faults ------

  /**
   * The first rule added that matches a request (and has not used up its times) is the one that
   * holds.
   */
  on(matcher: Matcher, fault: Fault): Rule {
    const rule: ActiveRule = { matcher, fault, seen: 0, hits: 0, reached: () => {} };
    const promise = new Promise<RequestRecord>((resolve) => {
      rule.reached = resolve;
    });
    this.#rules.push(rule);
    const remove = () => {
      const position = this.#rules.indexOf(rule);
      if (position >= 0) this.#rules.splice(position, 1);
    };
    return {
      get hits() {
        return rule.hits;
      },
      reached: promise,
      remove,
    };
  }

  #ruleFor(
    request: RequestRecord,
    authorized: boolean,
    content: Content | undefined,
  ): ActiveRule | undefined {
    return this.#rules.find((rule) => {
      const { matcher, fault } = rule;
      if (!authorized && !matcher.beforeAuth) return false;
      if (!matches(matcher, request)) return false;
      const answer =
        content && fault.body === undefined
          ? contentAnswer(content, request, fault, false)
          : undefined;
      if (answer && answer.status !== 416 && !reaches(fault, answer, request.method)) return false;
      const position = rule.seen - (matcher.skip ?? 0);
      if (position >= (matcher.times ?? Infinity)) return false;
      rule.seen += 1;
      if (position < 0) return false;
      rule.hits += 1;
      return true;
    });
  }

  // ------ Answers ------

  async #record(server: RequestRecord["server"], request: IncomingMessage): Promise<RequestRecord> {
    const { url = "/", method = "GET", headers } = request;
    const mark = url.indexOf("?");
    const path = mark < 0 ? url : url.slice(0, mark);
    const named = /^\/v2\/(.+)\/(manifests|blobs|referrers)\/([^/]+)$/.exec(path);
    const reference = decodeURIComponent(named?.[3] ?? /^\/store\/([^/]+)$/.exec(path)?.[1] ?? "");
    const { prefix = "" } = this.#options;
    const fullName = named?.[1] ?? "";
    const repository = fullName.startsWith(prefix) ? fullName.slice(prefix.length) : fullName;
    const socket = request.socket as Partial<TLSSocket>;
    const kind = (): RequestKind => {
      if (path === "/v2/" || path === "/v2") return "ping";
      if (path.startsWith("/store/")) return "storage";
      if (!named) return path.endsWith("/token") ? "token" : "other";
      if (named[2] === "manifests") return "manifest";
      if (named[2] === "referrers") return "other";
      return this.#repositories.get(repository)?.configs.has(reference) ? "config" : "layer";
    };
    const common = socket.getPeerCertificate?.().subject?.CN;
    const record: RequestRecord = {
      server,
      kind: kind(),
      method,
      url,
      path,
      query: new URLSearchParams(mark < 0 ? "" : url.slice(mark + 1)),
      headers,
      body: "",
      repository,
      reference,
      digest: undefined,
      range: headers.range,
      status: 0,
      bytesSent: 0,
      connection: this.#listener(server).connectionOf(request)?.number ?? 0,
      clientCertificate: Array.isArray(common) ? common[0] : common,
    };
    record.digest = this.#find(record)?.digest;
    this.requests.push(record);
    for await (const chunk of request) record.body += String(chunk);
    for (const watcher of this.#watchers) watcher();
    return record;
  }

  async #answer(
    server: RequestRecord["server"],
    request: IncomingMessage,
    response: ServerResponse,
  ): Promise<void> {
    // The connection is looked up first: a socket that is gone has forgotten its port.
    const connection = this.#listener(server).connectionOf(request);
    response.sendDate = false;
    response.on("error", () => {});
    const record = await this.#record(server, request).catch((error: NodeJS.ErrnoException) => {
      if (error.code === "ECONNRESET" || error.code === "ERR_STREAM_PREMATURE_CLOSE")
        return undefined;
      throw error;
    });
    if (!record) return;
    const found = this.#find(record);
    const refusal = this.#refusal(record);
    const rule = this.#ruleFor(record, refusal === undefined, found);
    const fault = rule?.fault ?? {};
    const reached = () => rule?.reached(record);
    const next = async () => {
      const answer = this.#scripted(record, fault) ?? refusal ?? this.#usual(record, found, fault);
      await send(response, spoil(answer, fault, record), fault, record, reached);
    };
    if (fault.wait) await Promise.race([fault.wait, gone(response)]);
    if (fault.reset) {
      reached();
      connection?.socket.resetAndDestroy();
    } else if (fault.handler) {
      reached();
      response.once("finish", () => {
        record.status = response.statusCode;
      });
      await fault.handler(request, response, next);
    } else {
      await next();
    }
  }

  #target(redirect: NonNullable<Fault["redirect"]>, record: RequestRecord): string {
    if (typeof redirect === "function") return redirect(record);
    if (redirect !== "storage" && redirect !== "self") return redirect;
    const path = this.signedPath(record.digest ?? record.reference);
    return redirect === "storage" ? this.storageUrl + path : path;
  }

  #scripted(record: RequestRecord, fault: Fault): Answer | undefined {
    if (fault.redirect !== undefined) {
      const { redirect, redirectStatus = 307 } = fault;
      const location = this.#target(redirect, record);
      return { status: redirectStatus, headers: { location }, body: Buffer.alloc(0), start: 0 };
    }
    if (fault.status === undefined) return undefined;
    if (fault.body === undefined)
      return failure(fault.status, "UNKNOWN", `scripted answer ${fault.status}`);
    return { status: fault.status, headers: {}, body: Buffer.from(fault.body), start: 0 };
  }

  #usual(record: RequestRecord, found: Content | undefined, fault: Fault): Answer {
    const { kind, method } = record;
    if (kind === "ping") return json(Buffer.from("{}"));
    const replaced = fault.body === undefined ? undefined : Buffer.from(fault.body);
    if (kind === "token") {
      const answer = this.#token(record);
      return replaced ? { ...answer, body: replaced } : answer;
    }
    if (method !== "GET" && method !== "HEAD")
      return failure(405, "UNSUPPORTED", "this registry is for pulling");
    const content = found && replaced ? { ...found, bytes: replaced } : found;
    if (content) return contentAnswer(content, record, fault, this.#options.etag === true);
    if (kind === "other" && this.#options.referrersPage && record.path.includes("/referrers/"))
      return this.#referrers(record, this.#options.referrersPage);
    if (kind === "other") return failure(404, "NOT_FOUND", "no such page");
    if (kind === "storage") return failure(404, "NoSuchKey", "no such key");
    if (kind !== "manifest") return failure(404, "BLOB_UNKNOWN", "blob unknown to registry");
    const named = this.#repositories.has(record.repository);
    return named
      ? failure(404, "MANIFEST_UNKNOWN", "manifest unknown")
      : failure(404, "NAME_UNKNOWN", "repository name not known to registry");
  }

  /** Those whose own manifest says so, whatever they are, page by page. */
  #referrers({ path, query }: RequestRecord, pageSize: number): Answer {
    const [, name = "", subject] = /^\/v2\/(.+)\/referrers\/([^/]+)$/.exec(path) ?? [];
    const { manifests } = this.#repository(name);
    const entries = [...manifests].flatMap(([digest, { mediaType, bytes }]) => {
      const { subject: named } = JSON.parse(bytes.toString("utf8"));
      return named?.digest === subject ? [{ mediaType, digest, size: bytes.length }] : [];
    });
    const start = Number(query.get("start") ?? 0);
    const page = entries.slice(start, start + pageSize);
    const list = { schemaVersion: 2, mediaType: MEDIA.ociIndex, manifests: page };
    const answer = json(Buffer.from(JSON.stringify(list)));
    const next = start + pageSize;
    if (next < entries.length) answer.headers.link = `<${path}?start=${next}>; rel="next"`;
    return answer;
  }

  // ------ Authorization ------

  /** The challenge (or storage's refusal) for a request that may not have what it asks for. */
  #refusal(record: RequestRecord): Answer | undefined {
    const { authorization } = record.headers;
    if (record.kind === "token") return undefined;
    if (record.kind === "storage") return this.#storageRefusal(record);
    const { mode, outsideToken } = this.#auth;
    if (
      mode === "none" ||
      (outsideToken !== undefined && authorization === `Basic ${outsideToken}`)
    )
      return undefined;
    const unauthorized = (usual: string, status = 401) => {
      const lines = this.#auth.challenge?.(usual, record.repository) ?? [usual];
      const headers: Headers = status === 401 ? { "www-authenticate": lines } : {};
      return failure(status, "UNAUTHORIZED", "authentication required", headers);
    };
    if (mode === "basic")
      return this.#knows(authorization) ? undefined : unauthorized('Basic realm="test registry"');
    const bearer = /^Bearer (.+)$/i.exec(authorization ?? "")?.[1];
    const challenge = this.#challenge(record);
    if (bearer === undefined) return unauthorized(challenge);
    const token = this.#tokens.get(bearer);
    if (!token || token.usesLeft <= 0) {
      return unauthorized(`${challenge},error="invalid_token"`, this.#auth.staleStatus ?? 401);
    }
    if (record.kind !== "ping" && !token.repositories.has(record.repository)) {
      return unauthorized(`${challenge},error="insufficient_scope"`);
    }
    token.usesLeft -= 1;
    return undefined;
  }

  #challenge(record: RequestRecord): string {
    // Its own token service is where it is itself for the one who asks, by whatever name.
    const own = `${new URL(this.url).protocol}//${record.headers.host}/token`;
    const isOwn = (this.#auth.tokenServer ?? "same") === "same";
    const { realm = isOwn ? own : this.tokenUrl, service = "test-registry" } = this.#auth;
    const {
      scope = record.repository ? `repository:${this.#fullName(record.repository)}:pull` : null,
    } = this.#auth;
    return [
      `Bearer realm="${realm}"`,
      ...(service === null ? [] : [`service="${service}"`]),
      ...(scope === null ? [] : [`scope="${scope}"`]),
    ].join(",");
  }

  #fullName(repository: string): string {
    return `${this.#options.prefix ?? ""}${repository}`;
  }

  #knows(authorization: string | undefined): boolean {
    const { user = USER, password = SECRETS.password } = this.#auth;
    return authorization === `Basic ${Buffer.from(`${user}:${password}`).toString("base64")}`;
  }

  /** GET with Basic, or the OAuth2 form of POST, as the distribution project documents the two. */
  #token(record: RequestRecord): Answer {
    const { anonymous = "welcome", refusedStatus = 401, postStatus } = this.#auth;
    const {
      user = USER,
      password = SECRETS.password,
      identityToken = SECRETS.identityToken,
    } = this.#auth;
    const code = refusedStatus === 403 ? "DENIED" : "UNAUTHORIZED";
    const refused = (message: string) => failure(refusedStatus, code, message);
    const { authorization } = record.headers;
    if (record.method !== "POST") {
      if (authorization !== undefined && !this.#knows(authorization))
        return refused("incorrect username or password");
      if (authorization === undefined && anonymous === "refused")
        return refused("credentials required");
      return this.#issue(
        record.query,
        authorization === undefined && anonymous === "useless",
        false,
      );
    }
    if (postStatus !== undefined) return failure(postStatus, "UNSUPPORTED", "no OAuth2 here");
    const form = new URLSearchParams(record.body);
    const good =
      form.get("grant_type") === "refresh_token"
        ? form.get("refresh_token") === identityToken
        : form.get("grant_type") === "password" &&
          form.get("username") === user &&
          form.get("password") === password;
    return good ? this.#issue(form, false, true) : refused("invalid_grant");
  }

  #issue(query: URLSearchParams, useless: boolean, oauth: boolean): Answer {
    const {
      tokenField = oauth ? "access_token" : "token",
      tokenUses = Infinity,
      expiresIn,
    } = this.#auth;
    this.#issued += 1;
    const token = `${SECRETS.bearerToken}${this.#issued}`;
    const scopes = query.getAll("scope").flatMap((scope) => scope.split(" "));
    const names = scopes.flatMap(
      (scope) => /^repository:(.+):(?:.*,)?pull(?:,.*)?$/.exec(scope)?.[1] ?? [],
    );
    const { prefix = "" } = this.#options;
    const repositories = new Set(
      names.map((name) => (name.startsWith(prefix) ? name.slice(prefix.length) : name)),
    );
    this.#tokens.set(token, {
      repositories: useless ? new Set() : repositories,
      usesLeft: tokenUses,
    });
    const fields = {
      ...(tokenField !== "access_token" && { token }),
      ...(tokenField !== "token" && { access_token: token }),
      ...(expiresIn !== undefined && { expires_in: expiresIn }),
      ...this.#auth.tokenFields,
    };
    return json(Buffer.from(JSON.stringify(fields)));
  }

  /** Every token issued so far is stale from now on. */
  expireTokens(): void {
    this.#tokens.clear();
  }

  // ------ Storage ------

  /**
   * A signed path for the content with this digest; good on the storage server and on the registry
   * itself.
   */
  signedPath(digest: string): string {
    const signature = `${SECRETS.signature}${this.#signatures.size + 1}`;
    this.#signatures.set(signature, { usesLeft: this.#options.storage?.singleUse ? 1 : Infinity });
    return `/store/${encodeURIComponent(digest)}?X-Amz-Expires=1200&X-Amz-Signature=${signature}`;
  }

  /** Every signed URL given out so far has expired (403). */
  expireSignatures(): void {
    for (const signature of this.#signatures.values()) signature.usesLeft = 0;
  }

  #storageRefusal(record: RequestRecord): Answer | undefined {
    const { refuseAuthorization = true, challenge } = this.#options.storage ?? {};
    const { authorization } = record.headers;
    const xml = (status: number, code: string): Answer => ({
      status,
      headers: { "content-type": "application/xml" },
      start: 0,
      body: Buffer.from(`<Error><Code>${code}</Code></Error>`),
    });
    if (challenge !== undefined && authorization === undefined) {
      return { ...xml(401, "AuthenticationRequired"), headers: { "www-authenticate": challenge } };
    }
    if (refuseAuthorization && authorization !== undefined) return xml(400, "InvalidArgument");
    const signature = this.#signatures.get(record.query.get("X-Amz-Signature") ?? "");
    if (!signature || signature.usesLeft <= 0) return xml(403, "AccessDenied");
    signature.usesLeft -= 1;
    return undefined;
  }

  // ------ What was asked for ------

  /** Requests that match, in the order in which they came. */
  seen(matcher: Matcher = {}): RequestRecord[] {
    return this.requests.filter((request) => matches(matcher, request));
  }

  /**
   * GETs for layers and configs, by digest or all; those at the storage server are not among them.
   */
  blobRequests(digest?: string): RequestRecord[] {
    return this.seen({ kind: "blob", method: "GET", ...(digest !== undefined && { digest }) });
  }

  manifestRequests(): RequestRecord[] {
    return this.seen({ kind: "manifest" });
  }

  tokenRequests(): RequestRecord[] {
    return this.seen({ kind: "token" });
  }

  storageRequests(digest?: string): RequestRecord[] {
    return this.seen({ kind: "storage", ...(digest !== undefined && { digest }) });
  }

  /**
   * Body bytes of blobs that registry and storage have sent; error bodies and manifests are not
   * counted.
   */
  bytesServed(digest?: string): number {
    const held = [...this.#repositories.values()];
    const served = [...this.blobRequests(digest), ...this.storageRequests(digest)].filter(
      (request) =>
        (request.status === 200 || request.status === 206) &&
        !held.some(({ manifests }) => manifests.has(request.digest ?? "")),
    );
    return served.reduce((total, { bytesSent }) => total + bytesSent, 0);
  }

  /** Settles when so many requests that match have come, those that are there already included. */
  async arrived(matcher: Matcher, count = 1): Promise<void> {
    while (this.seen(matcher).length < count) {
      await new Promise<void>((done) => {
        const watcher = () => {
          this.#watchers.delete(watcher);
          done();
        };
        this.#watchers.add(watcher);
      });
    }
  }

  /** Settles when no answer is under way, so that counts of bytes are final. */
  async settled(): Promise<void> {
    while (this.#running.size > 0) await Promise.all(this.#running);
  }

  /** Forgets the requests seen (not the connections). */
  forget(): void {
    this.requests.length = 0;
  }

  /** Closes all connections at once; the registry goes on. */
  disconnect(): void {
    for (const listener of this.#listeners.values()) listener.disconnect();
  }

  async close(): Promise<void> {
    await Promise.all([...this.#listeners.values()].map((listener) => listener.close()));
  }
}

function matches(matcher: Matcher, request: RequestRecord): boolean {
  const { kind, path } = matcher;
  const blob = request.kind === "layer" || request.kind === "config";
  if (kind !== undefined && !(kind === "blob" ? blob : kind === request.kind)) return false;
  if (
    path !== undefined &&
    !(typeof path === "string" ? path === request.path : path.test(request.path))
  )
    return false;
  if (matcher.method !== undefined && matcher.method !== request.method) return false;
  if (matcher.repository !== undefined && matcher.repository !== request.repository) return false;
  if (matcher.digest !== undefined && matcher.digest !== request.digest) return false;
  if (matcher.tag !== undefined && matcher.tag !== request.reference) return false;
  if (matcher.ranged !== undefined && matcher.ranged !== (request.range !== undefined))
    return false;
  return matcher.where?.(request) ?? true;
}

/** Starts a registry on 127.0.0.1; give the test's context, and it is closed when the test ends. */
export async function startRegistry(
  options: RegistryOptions = {},
  t?: TestScope,
): Promise<Registry> {
  const registry = await Registry.start(options);
  t?.after(() => registry.close());
  return registry;
}

/**
 * Waits until nothing lies in a socket of this server or its clients that nobody has read yet. Only
 * Linux shows it; elsewhere some of the last bytes may be lost.
 */
export async function untilRead(server: { host: string }): Promise<void> {
  const port = Number(server.host.split(":")[1]).toString(16).toUpperCase().padStart(4, "0");
  const isWaiting = (): boolean =>
    readFileSync("/proc/net/tcp", "latin1")
      .split("\n")
      .slice(1)
      .some((line) => {
        const [, local = "", remote = "", , queues = ""] = line.trim().split(/\s+/);
        return (
          (local.endsWith(`:${port}`) || remote.endsWith(`:${port}`)) &&
          queues !== "00000000:00000000"
        );
      });
  while (process.platform === "linux" && isWaiting()) await new Promise(setImmediate);
}
