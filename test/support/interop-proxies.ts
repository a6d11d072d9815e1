// Proxies that people run, and what they take for one: tinyproxy, haproxy's TLS before another, a
// SOCKS server.
import { connect } from "node:net";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import {
  type Account,
  interopFolder,
  type Program,
  type ServerTls,
  Service,
  startOnFreePort,
  writeFiles,
} from "./interop.ts";

export class ProxyService extends Service {
  readonly port: number;

  constructor(program: Program, port: number) {
    super(program);
    this.port = port;
  }

  get host(): string {
    return `127.0.0.1:${this.port}`;
  }
}

export function startTinyproxy(account?: Account): Promise<ProxyService> {
  const folder = interopFolder("tinyproxy");
  return startOnFreePort((port) => {
    const { "tinyproxy.conf": config } = writeFiles(folder, {
      "tinyproxy.conf": [
        `Port ${port}`,
        "Listen 127.0.0.1",
        "LogLevel Info",
        account && `BasicAuth ${account.user} ${account.password}`,
        "",
      ].join("\n"),
    });
    const command = ["tinyproxy", "-d", "-c", config];
    const ready = /Accepting connections/;
    return new ProxyService(
      { name: "tinyproxy", folder, command, ready, stopSignal: "SIGKILL" },
      port,
    );
  });
}

/** TLS before another program's port. */
export function startHaproxy(tls: ServerTls, upstream: number): Promise<ProxyService> {
  const folder = interopFolder("haproxy");
  return startOnFreePort((port) => {
    const files = writeFiles(folder, { "both.pem": `${tls.cert}${tls.key}` });
    const { "haproxy.cfg": config } = writeFiles(folder, {
      "haproxy.cfg": `global
  maxconn 100
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen proxy
  bind 127.0.0.1:${port} ssl crt ${files["both.pem"]}
  server upstream 127.0.0.1:${upstream}
`,
    });
    const command = ["sh", "-c", `echo starting; exec haproxy -db -f ${config}`];
    const program: Program = {
      name: "haproxy",
      folder,
      command,
      ready: /starting/,
      stopSignal: "SIGKILL",
    };
    return new ProxyService(program, port);
  }).then(whenListening);
}

export function startMicrosocks(): Promise<ProxyService> {
  const folder = interopFolder("microsocks");
  return startOnFreePort((port) => {
    const command = ["sh", "-c", `echo starting; exec microsocks -i 127.0.0.1 -p ${port}`];
    const program: Program = {
      name: "microsocks",
      folder,
      command,
      ready: /starting/,
      stopSignal: "SIGKILL",
    };
    return new ProxyService(program, port);
  }).then(whenListening);
}

/** For programs that say nothing when they listen. */
export async function whenListening(service: ProxyService): Promise<ProxyService> {
  for (let attempt = 0; attempt < 500; attempt += 1) {
    const socket = connect(service.port, "127.0.0.1");
    const isListening = await new Promise<boolean>((resolve) => {
      socket.once("connect", () => resolve(true)).once("error", () => resolve(false));
    });
    socket.destroy();
    if (isListening) return service;
    await pause(20);
  }
  throw new Error(`nobody listens on ${service.host}:\n${service.log()}`);
}

/**
 * A TLS server that does not know RFC 5746, as middleboxes are; it listens on every address, so
 * only in a network of its own, in which `command` is run too.
 */
export function besideLegacyTls(tls: ServerTls, command: readonly string[]): string[] {
  const folder = interopFolder("gnutls");
  const files = writeFiles(folder, { "cert.pem": tls.cert, "key.pem": tls.key });
  const priority = "NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2:%DISABLE_SAFE_RENEGOTIATION";
  const log = join(folder, "log");
  const script = `
ip link set lo up
gnutls-serv --http -p 5556 --x509certfile ${files["cert.pem"]} --x509keyfile ${files["key.pem"]} \\
  --priority ${priority} >${log} 2>&1 &
server=$!
trap 'kill $server' EXIT
until grep -q 'IPv4 .*done' ${log}; do kill -0 $server || exit 99; sleep 0.05; done
"$@"`;
  return ["unshare", "-n", "sh", "-c", script, "sh", ...command];
}
