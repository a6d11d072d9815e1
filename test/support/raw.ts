// A server that writes what no HTTP library would, byte by byte: in front of a test registry, or
// alone.
import { once } from "node:events";
import { request as httpRequest, type IncomingHttpHeaders } from "node:http";
import { type AddressInfo, createServer, type Socket } from "node:net";
import { createServer as createTlsServer, type TlsOptions } from "node:tls";
import type { TestScope } from "./command.ts";

export interface RawRequest {
  method: string;
  /** As it stood in the request line. */
  target: string;
  head: string;
  /** How many requests came before, over all connections. */
  earlier: number;
}

export interface RawServer {
  host: string;
  port: number;
  requests: RawRequest[];
  /** Counts those that said nothing too. */
  connections: number;
  /** Sockets that are open now. */
  open: Set<Socket>;
}

type Handle = (socket: Socket, request: RawRequest, server: RawServer) => unknown;

export interface RawOptions {
  tls?: TlsOptions;
  address?: string;
  /** Called with each connection, before anything is read. */
  onConnection?: (socket: Socket) => void;
}

/**
 * Calls `handle` for each head of a request that has come; what is written to the socket is the
 * answer.
 */
export async function startRawServer(
  t: TestScope,
  handle: Handle,
  { tls, address = "127.0.0.1", onConnection }: RawOptions = {},
): Promise<RawServer> {
  const state: RawServer = { host: "", port: 0, requests: [], connections: 0, open: new Set() };

  const serve = (socket: Socket) => {
    let pending = "";
    onConnection?.(socket);
    socket.on("error", () => {});
    socket.on("data", (chunk) => {
      pending += chunk.toString("latin1");
      for (let end = pending.indexOf("\r\n\r\n"); end >= 0; end = pending.indexOf("\r\n\r\n")) {
        const head = pending.slice(0, end);
        pending = pending.slice(end + 4);
        const [method = "", target = ""] = head.split(" ");
        const request = { method, target, head, earlier: state.requests.length };
        state.requests.push(request);
        void handle(socket, request, state);
      }
    });
  };

  const server = tls ? createTlsServer(tls, serve) : createServer(serve);
  server.on("tlsClientError", () => {});
  server.on("connection", (socket: Socket) => {
    state.connections += 1;
    state.open.add(socket.on("error", () => {}).once("close", () => state.open.delete(socket)));
  });
  server.listen(0, address);
  await once(server, "listening");
  t.after(() => {
    server.close();
    for (const socket of state.open) socket.destroy();
  });

  state.port = (server.address() as AddressInfo).port;
  state.host = `${address.includes(":") ? `[${address}]` : address}:${state.port}`;
  return state;
}

export interface RelayedAnswer {
  status: number;
  headers: IncomingHttpHeaders;
  body: Buffer;
}

/** What the server at `host` answers to the same request. */
export async function relay(host: string, { method, target, head }: RawRequest) {
  const [, ...lines] = head.split("\r\n");
  const headers = Object.fromEntries(
    lines.map((line) => [
      line.slice(0, line.indexOf(":")),
      line.slice(line.indexOf(":") + 1).trim(),
    ]),
  );
  const outgoing = httpRequest({
    host: host.split(":")[0],
    port: host.split(":")[1],
    method,
    path: target,
    headers: { ...headers, Connection: "close" },
    agent: false,
  }).end();
  const [incoming] = await once(outgoing, "response");
  const chunks: Buffer[] = [];
  for await (const chunk of incoming) chunks.push(chunk);
  const body = Buffer.concat(chunks);
  return { status: incoming.statusCode, headers: incoming.headers, body } as RelayedAnswer;
}

/** The lines of a head, without those that frame the body. */
export function headLines({ headers }: RelayedAnswer): string[] {
  return Object.entries(headers)
    .filter(([name]) => !["content-length", "transfer-encoding", "connection"].includes(name))
    .flatMap(([name, value]) => [value].flat().map((each) => `${name}: ${each}`));
}
