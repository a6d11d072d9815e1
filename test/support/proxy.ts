// A forward proxy on loopback: CONNECT tunnels and absolute-form requests. imgpull never sends
// loopback through a proxy, so tests give it names that only the proxy can resolve.
import { once } from "node:events";
import {
  createServer,
  request as httpRequest,
  type IncomingHttpHeaders,
  type IncomingMessage,
} from "node:http";
import { createServer as createTlsServer } from "node:https";
import { type AddressInfo, connect, type Socket } from "node:net";
import type { Duplex } from "node:stream";
import { SECRETS, type TestScope, USER } from "./command.ts";
import type { TlsOptions } from "./registry.ts";

export interface ProxyOptions {
  /** TLS between client and proxy. */
  tls?: TlsOptions;
  /** `NAME` or `NAME:PORT` to `127.0.0.1` or `127.0.0.1:PORT`; a name that is not here gets 502. */
  hosts: Record<string, string>;
  /** Demands USER and SECRETS.proxyPassword, by 407. */
  credentials?: boolean;
  /** Every CONNECT and request: this status, nothing at all, or the connection closed. */
  fault?: number | "silent" | "close";
  /** Only so many of the first ones; default all. */
  faults?: number;
}

export interface ProxyRequest {
  method: string;
  /** As it stood in the request line: `name:port` of a CONNECT, else the whole URL. */
  target: string;
  headers: IncomingHttpHeaders;
  status: number;
}

export class TestProxy {
  readonly requests: ProxyRequest[] = [];
  /** Settles with the first request. */
  readonly asked: Promise<void>;
  url = "";
  host = "";
  readonly #options: ProxyOptions;
  readonly #sockets = new Set<Duplex>();
  #close: () => Promise<void> = async () => {};
  #wasAsked = () => {};

  private constructor(options: ProxyOptions) {
    this.#options = options;
    this.asked = new Promise((done) => {
      this.#wasAsked = done;
    });
  }

  /** @internal Use startProxy(). */
  static async start(options: ProxyOptions): Promise<TestProxy> {
    const proxy = new TestProxy(options);
    const server = options.tls
      ? createTlsServer({ key: options.tls.key, cert: options.tls.cert })
      : createServer();
    server.on("connection", (socket: Socket) => proxy.#track(socket));
    server.on("tlsClientError", () => {}).on("clientError", (_error, socket) => socket.destroy());
    server.on("connect", (request: IncomingMessage, socket: Duplex, head: Buffer) =>
      proxy.#tunnel(request, socket, head),
    );
    server.on("request", (request, response) => {
      const record = proxy.#record(request);
      if (record.status === 0) return;
      const target = URL.canParse(record.target) ? new URL(record.target) : undefined;
      const address = target && proxy.#resolve(target.host, 80);
      if (record.status !== 200 || !target || !address) {
        if (record.status === 200) record.status = target ? 502 : 400;
        response
          .writeHead(record.status, record.status === 407 ? { "proxy-authenticate": "Basic" } : {})
          .end();
        return;
      }
      const { "proxy-authorization": _kept, ...headers } = request.headers;
      const path = `${target.pathname}${target.search}`;
      const onward = httpRequest(
        { ...address, method: request.method, path, headers, agent: false },
        (answer) => {
          response.writeHead(answer.statusCode ?? 502, answer.headers);
          answer.pipe(response).on("error", () => {});
          answer.on("error", () => response.destroy());
        },
      );
      onward.on("error", () => response.destroy());
      request.pipe(onward);
    });
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    proxy.host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    proxy.url = `${options.tls ? "https" : "http"}://${proxy.host}`;
    proxy.#close = async () => {
      const closed = once(server, "close");
      server.close();
      for (const socket of proxy.#sockets) socket.destroy();
      await closed;
    };
    return proxy;
  }

  /** With USER and the secret. */
  get urlWithCredentials(): string {
    return this.url.replace("://", `://${USER}:${SECRETS.proxyPassword}@`);
  }

  #track(socket: Duplex): void {
    this.#sockets.add(socket);
    socket.on("error", () => {}).once("close", () => this.#sockets.delete(socket));
  }

  #record(request: IncomingMessage): ProxyRequest {
    const { method = "", url: target = "", headers } = request;
    const { fault, faults = Infinity, credentials } = this.#options;
    const known = `Basic ${Buffer.from(`${USER}:${SECRETS.proxyPassword}`).toString("base64")}`;
    const faulty = fault !== undefined && this.requests.length < faults;
    const refused = credentials && headers["proxy-authorization"] !== known;
    const usual = refused ? 407 : 200;
    const broken = typeof fault === "number" ? fault : 0;
    const status = faulty ? broken : usual;
    if (faulty && fault === "close") request.socket.destroy();
    const record = { method, target, headers, status };
    this.requests.push(record);
    this.#wasAsked();
    return record;
  }

  #resolve(authority: string, defaultPort: number): { host: string; port: number } | undefined {
    const [name = "", port = String(defaultPort)] = authority.split(":");
    const address = this.#options.hosts[`${name}:${port}`] ?? this.#options.hosts[name];
    if (address === undefined) return undefined;
    const [host = "", mappedPort = port] = address.split(":");
    return { host, port: Number(mappedPort) };
  }

  #tunnel(request: IncomingMessage, socket: Duplex, head: Buffer): void {
    this.#track(socket);
    const record = this.#record(request);
    if (record.status === 0) return;
    const address = this.#resolve(record.target, 443);
    if (record.status === 200 && !address) record.status = 502;
    if (record.status !== 200 || !address) {
      const challenge =
        record.status === 407 ? 'Proxy-Authenticate: Basic realm="test proxy"\r\n' : "";
      socket.end(`HTTP/1.1 ${record.status} Refused\r\n${challenge}Content-Length: 0\r\n\r\n`);
      return;
    }
    const upstream = connect(address, () => {
      socket.write("HTTP/1.1 200 Connection established\r\n\r\n");
      upstream.write(head);
      upstream.pipe(socket).pipe(upstream);
    });
    this.#track(upstream);
    upstream.once("close", () => socket.destroy());
    socket.once("close", () => upstream.destroy());
  }

  async close(): Promise<void> {
    await this.#close();
  }
}

/** Starts a proxy on 127.0.0.1; it is closed when the test ends. */
export async function startProxy(t: TestScope, options: ProxyOptions): Promise<TestProxy> {
  const proxy = await TestProxy.start(options);
  t.after(() => proxy.close());
  return proxy;
}
