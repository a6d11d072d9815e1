// imgpull.ts
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import * as fs from "node:fs/promises";
import * as http from "node:http";
import * as https from "node:https";
import * as net from "node:net";
import * as os from "node:os";
import * as path from "node:path";
import { Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import * as tls from "node:tls";
import { parseArgs } from "node:util";
import * as zlib from "node:zlib";
var DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json";
var DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json";
var OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json";
var OCI_INDEX = "application/vnd.oci.image.index.v1+json";
var MANIFEST_TYPES = [OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST];
var IMAGE_CONFIG_TYPES = [
  "application/vnd.docker.container.image.v1+json",
  "application/vnd.oci.image.config.v1+json"
];
var KIB = 1024;
var MIB = 1024 * KIB;
var LIMITS = Object.freeze({
  manifestBytes: 4 * MIB,
  // the distribution specification's own floor for registries
  configBytes: 16 * MIB,
  tokenBytes: MIB,
  errorBodyBytes: 64 * KIB,
  credentialFileBytes: 4 * MIB,
  indexDepth: 4,
  indexEntries: 1024,
  // with `--platform all` each entry is a request
  redirects: 10,
  tokenFloorMs: 6e4,
  // the token specification's default, and more than GitLab's skewed clocks take away
  firstBackoffMs: 1e3,
  backoffMs: 3e4,
  retryAfterMs: 12e4,
  // longer waits are the user's to decide
  batchBytes: MIB,
  // one write to disk: fewer trips to Node's thread pool than one for each chunk
  journalBytes: 4 * MIB,
  // how much a kill -9 may cost each connection
  splitBytes: MIB,
  // neither half of a range that is cut in two is smaller
  fastLineBytesPerSecond: 256 * MIB,
  // from here on the processor is the limit, and more connections only cost
  farLatencyMs: 10,
  // from here on a line is worth several connections before its speed is known
  streamUnitBytes: 4 * MIB,
  // DEST `-`: one request's share of a large blob
  streamWindowBytes: 32 * MIB,
  // DEST `-`: how far the line may be ahead of the reader
  tarMetadataBytes: 16 * MIB
  // index.json and the like of a tar that someone else made
});
var ImgpullError = class extends Error {
  name = "ImgpullError";
  code;
  status;
  /** @internal how long the server asks us to stay away */
  retryAfterMs;
  constructor(code, message, more = {}) {
    super(message, more.cause === void 0 ? void 0 : { cause: more.cause });
    this.code = code;
    if (more.status !== void 0) this.status = more.status;
    if (more.retryAfterMs !== void 0) this.retryAfterMs = more.retryAfterMs;
  }
};
function errorCodeOf(error) {
  const code = error?.code;
  return typeof code === "string" ? code : "";
}
function printable(text, maximum = 300) {
  const clean = text.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g, " ").trim();
  return clean.length > maximum ? `${clean.slice(0, maximum)}…` : clean;
}
function redactUrl(url) {
  const copy = new URL(url);
  const namespace = copy.searchParams.get("ns");
  const shown = `${copy.protocol}//${copy.host}${copy.pathname}`;
  return printable(namespace === null ? shown : `${shown}?ns=${namespace}`);
}
var TLS_REMEDY = {
  CERT_HAS_EXPIRED: "the server's certificate has expired",
  ERR_TLS_CERT_ALTNAME_INVALID: "the server's certificate is for another name"
};
function connectionError(error, doing) {
  if (error instanceof ImgpullError) return error;
  const cause = error;
  const code = errorCodeOf(error);
  const words = printable(cause.message ?? String(error));
  if (code === "ABORT_ERR" || cause.name === "AbortError") return new ImgpullError("ABORTED", "stopped", { cause });
  if (/wrong version number|packet length too long|unknown protocol|record layer failure/i.test(words)) {
    return new ImgpullError("TLS", `${doing}: the server answers plain HTTP on this port
  try --scheme http`, { cause });
  }
  const untrusted = /^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO|CERT_|INVALID_|ERR_TLS|ERR_SSL|EPROTO)/.test(code);
  if (untrusted && code !== "ERR_TLS_HANDSHAKE_TIMEOUT") {
    const unknownAuthority = /^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO)/.test(code);
    const remedy = unknownAuthority ? "\n  the certificate authority is not known here: give it with --cacert FILE, or go without the check by --insecure" : /certificate required|bad certificate|handshake failure/i.test(words) ? "\n  the server may want a client certificate: --cert FILE --key FILE" : "";
    return new ImgpullError("TLS", `${doing}: ${TLS_REMEDY[code] ?? words}${remedy}`, { cause });
  }
  if (code === "ENOTFOUND") return new ImgpullError("NETWORK", `${doing}: no such host`, { cause });
  const nested = error.errors?.[0];
  const said = words || printable(String(nested?.message ?? code));
  return new ImgpullError("NETWORK", `${doing}: ${code === "ECONNRESET" ? "connection lost" : said}`, { cause });
}
var DISK_WORDS = {
  ENOSPC: "the disk is full",
  EDQUOT: "the disk quota is used up",
  EROFS: "the file system is read-only",
  EACCES: "permission denied",
  EPERM: "permission denied",
  ERR_ACCESS_DENIED: "not allowed by Node's permission model",
  ENOENT: "no such file or directory",
  ENOTDIR: "a part of the path is not a directory",
  EISDIR: "it is a directory",
  EFBIG: "the file system does not take a file of that size"
};
function diskError(error, doing) {
  if (error instanceof ImgpullError) return error;
  const cause = error;
  return new ImgpullError("DISK", `${doing}: ${DISK_WORDS[errorCodeOf(error)] ?? printable(cause.message)}`, { cause });
}
var DIGEST_HEX_LENGTH = { sha256: 64, sha512: 128 };
function isDigest(text) {
  if (typeof text !== "string") return false;
  const [, algorithm, hex] = /^(sha256|sha512):([0-9a-f]+)$/.exec(text) ?? [];
  return algorithm !== void 0 && hex?.length === DIGEST_HEX_LENGTH[algorithm];
}
function newHash(digest) {
  return createHash(digest.slice(0, digest.indexOf(":")));
}
function digestOf(bytes, like = "sha256:") {
  return `${like.slice(0, like.indexOf(":"))}:${newHash(like).update(bytes).digest("hex")}`;
}
function blobPath(digest) {
  return `blobs/${digest.replace(":", "/")}`;
}
function isRecord(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
function formatBytes(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1e3;
    unit += 1;
  }
  return `${unit === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}
function formatPlatform(platform) {
  if (!platform) return "";
  return [platform.os, platform.architecture, platform.variant].filter(Boolean).join("/");
}
async function mapConcurrently(items, limit, run) {
  const results = [];
  let next = 0;
  const lane = async () => {
    while (next < items.length) {
      const index = next++;
      const [settled] = await Promise.allSettled([run(items[index])]);
      results[index] = settled;
    }
  };
  await Promise.all(Array.from({ length: Math.min(limit, items.length) }, lane));
  const failures = results.flatMap((result) => result.status === "rejected" ? [result.reason] : []);
  if (failures.length > 0) throw joinErrors(failures);
  return results.map((result) => result.value);
}
function joinErrors(failures) {
  const bug = failures.find((failure) => !(failure instanceof ImgpullError));
  if (bug !== void 0) return bug;
  const known2 = failures;
  const first = known2.find((failure) => failure.code === "ABORTED") ?? known2[0];
  const messages = [...new Set(known2.map((failure) => failure.message))];
  if (messages.length === 1 || first.code === "ABORTED") return first;
  return new ImgpullError(first.code, messages.join("\n"), { status: first.status, cause: first });
}
var DOCKER_HUB_HOSTS = ["docker.io", "index.docker.io", "registry-1.docker.io"];
var HOST = /^(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*\.?|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?$/;
var REPOSITORY = /^[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:\/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*$/;
var TAG = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/;
function looksLikeHost(segment) {
  return segment.includes(".") || segment.includes(":") || segment === "localhost";
}
function parseReference(text) {
  const refuse = (reason) => {
    throw new ImgpullError("BAD_REFERENCE", `bad image reference "${printable(text)}": ${reason}`);
  };
  if (text === "") refuse("it is empty");
  if (/^[a-z]+:\/\//i.test(text)) refuse("write it without the scheme (use --scheme for http)");
  if (/[^\x21-\x7e]/.test(text)) refuse("it has a character that is not printable ASCII");
  const [named = "", digest, ...tooMany] = text.split("@");
  if (tooMany.length > 0) refuse("it has more than one @");
  if (digest !== void 0 && !isDigest(digest)) {
    refuse(`"${printable(digest)}" is not a digest: sha256: and 64, or sha512: and 128 lower-case hex digits`);
  }
  const slash = named.indexOf("/");
  const first = named.slice(0, Math.max(slash, 0));
  const hasHost = slash > 0 && looksLikeHost(first);
  const givenHost = hasHost ? first : "docker.io";
  const rest = hasHost ? named.slice(slash + 1) : named;
  const colon = rest.lastIndexOf(":");
  const tag = colon < 0 ? void 0 : rest.slice(colon + 1);
  let repository = colon < 0 ? rest : rest.slice(0, colon);
  const port = HOST.exec(givenHost)?.[1];
  if (!HOST.test(givenHost) || port !== void 0 && (Number(port) < 1 || Number(port) > 65535)) {
    refuse(`"${givenHost}" is not a host or host:port`);
  }
  if (givenHost.startsWith("[") && net.isIPv6(givenHost.slice(1, givenHost.indexOf("]"))) === false) {
    refuse(`"${givenHost}" is not an IPv6 address in brackets`);
  }
  if (repository === "") refuse("the repository is missing");
  if (repository !== repository.toLowerCase()) refuse("a repository is written in lower case");
  if (!REPOSITORY.test(repository)) refuse(`"${repository}" is not a repository name`);
  if (tag !== void 0 && !TAG.test(tag)) refuse(`"${tag}" is not a tag`);
  const host = DOCKER_HUB_HOSTS.includes(givenHost.toLowerCase()) ? "docker.io" : givenHost;
  if (host === "docker.io" && !repository.includes("/")) repository = `library/${repository}`;
  if (host.length + repository.length + 1 > 255) refuse("host and repository are longer than 255 characters");
  return {
    host,
    repository,
    ...tag !== void 0 ? { tag } : digest === void 0 ? { tag: "latest" } : {},
    ...digest !== void 0 ? { digest } : {}
  };
}
function formatReference(reference) {
  const tag = reference.tag === void 0 ? "" : `:${reference.tag}`;
  const digest = reference.digest === void 0 ? "" : `@${reference.digest}`;
  return `${reference.host}/${reference.repository}${tag}${digest}`;
}
function apiHost(host) {
  return host === "docker.io" ? "registry-1.docker.io" : host;
}
function imageName(reference, namespace) {
  const upstream = namespace !== void 0 ? `${namespace}/${reference.repository}` : reference.repository;
  const [first = "", ...more] = upstream.split("/");
  const isMirrored = namespace !== void 0 || first.includes(".") && more.length > 0;
  const bare = isMirrored ? upstream : `${reference.host}/${reference.repository}`;
  const suffix = reference.tag !== void 0 ? `:${reference.tag}` : `@${reference.digest}`;
  return parseReference(`${bare}${suffix}`);
}
function defaultDestination(reference) {
  const name = reference.repository.slice(reference.repository.lastIndexOf("/") + 1);
  return `${name}-${reference.tag ?? reference.digest?.split(":")[1]?.slice(0, 12)}.tar`;
}
async function readOptional(file) {
  try {
    return await fs.readFile(file, "utf8");
  } catch {
    return void 0;
  }
}
var CA_BUNDLES = [
  "/etc/ssl/certs/ca-certificates.crt",
  "/etc/pki/tls/certs/ca-bundle.crt",
  "/etc/ssl/ca-bundle.pem",
  "/etc/pki/tls/cacert.pem",
  "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
  "/etc/ssl/cert.pem",
  "/usr/local/etc/ssl/cert.pem",
  "/usr/local/share/certs/ca-root-nss.crt",
  "/etc/openssl/certs/ca-certificates.crt"
];
var CA_DIRECTORIES = ["/etc/ssl/certs", "/etc/pki/tls/certs", "/system/etc/security/cacerts"];
async function systemCertificates(environment) {
  const found = /* @__PURE__ */ new Set();
  for (const file of environment.SSL_CERT_FILE ? [environment.SSL_CERT_FILE] : CA_BUNDLES) {
    const bundle = await readOptional(file);
    if (bundle !== void 0) {
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
  const getCertificates = tls.getCACertificates;
  const isFileless = process.platform === "darwin" || process.platform === "win32";
  if (found.size === 0 && isFileless) for (const text of getCertificates?.("system") ?? []) found.add(text);
  if (found.size === 0) for (const text of tls.rootCertificates) found.add(text);
  const extra = environment.NODE_EXTRA_CA_CERTS;
  const extraText = extra ? await readOptional(extra) : void 0;
  if (extraText !== void 0 && ![...found].some((text) => text.includes(extraText.trim()))) found.add(extraText);
  return [...found];
}
async function readPem(file, option) {
  const text = await fs.readFile(file, "utf8").catch((error) => {
    throw new ImgpullError("TLS", `cannot read ${option} ${file}: ${DISK_WORDS[errorCodeOf(error)] ?? "unreadable"}`);
  });
  if (!text.includes("-----BEGIN ")) throw new ImgpullError("TLS", `${option} ${file} is not a PEM file`);
  return text;
}
async function readCertsDirectory(directory) {
  const read = { ca: [], cert: [], key: [] };
  const names = await fs.readdir(directory).catch(() => []);
  for (const name of names.sort()) {
    const kind = name.endsWith(".crt") ? "ca" : name.endsWith(".cert") ? "cert" : name.endsWith(".key") ? "key" : void 0;
    if (kind) read[kind].push(await readPem(path.join(directory, name), "certificate"));
  }
  return read;
}
function secureContexts(settings) {
  const contexts = /* @__PURE__ */ new Map();
  const make = async (url, isRegistry) => {
    const ca = await systemCertificates(settings.environment);
    if (settings.caCert !== void 0) ca.push(await readPem(settings.caCert, "--cacert"));
    const forHost = isRegistry ? await readCertsDirectory(path.join(settings.certsDirectory, url.host)) : { ca: [], cert: [], key: [] };
    if (isRegistry && settings.tlsCert !== void 0 && settings.tlsKey !== void 0) {
      forHost.cert = [await readPem(settings.tlsCert, "--cert")];
      forHost.key = [await readPem(settings.tlsKey, "--key")];
    }
    try {
      return tls.createSecureContext({ ca: [...ca, ...forHost.ca], cert: forHost.cert, key: forHost.key });
    } catch (error) {
      throw new ImgpullError("TLS", `cannot use the certificates given: ${printable(error.message)}`, {
        cause: error
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
function isExemptFromProxy(url, noProxy) {
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
    if (prefix !== void 0 && net.isIP(block) !== 0 && net.isIP(host) !== 0) {
      const bits = Number(prefix);
      if (!Number.isInteger(bits) || bits < 0 || bits > (net.isIP(block) === 6 ? 128 : 32)) return false;
      const list = new net.BlockList();
      list.addSubnet(block, bits, net.isIP(block) === 6 ? "ipv6" : "ipv4");
      return list.check(host, family);
    }
    const [, name = "", wantedPort] = /^(\[[^\]]*\]|[^:]*|.*:.*:.*?)(?::(\d+))?$/.exec(entry.toLowerCase()) ?? [];
    if (wantedPort !== void 0 && wantedPort !== port) return false;
    const bare = name.replace(/^\[|\]$/g, "").replace(/^\*?\./, "");
    return bare !== "" && (host === bare || net.isIP(host) === 0 && host.endsWith(`.${bare}`));
  });
}
function proxyFor(url, environment) {
  const variable = (name2) => environment[name2] || environment[name2.toLowerCase()] || "";
  const name = url.protocol === "https:" ? "HTTPS_PROXY" : "HTTP_PROXY";
  const value = variable(name) || variable("ALL_PROXY");
  if (value === "" || isExemptFromProxy(url, variable("NO_PROXY"))) return void 0;
  const withScheme = /^[a-z][a-z0-9+.-]*:\/\//i.test(value) ? value : `http://${value}`;
  const proxy = URL.canParse(withScheme) ? new URL(withScheme) : void 0;
  if (!proxy) throw new ImgpullError("PROXY", `${variable(name) ? name : "ALL_PROXY"} is not a URL`);
  if (proxy.protocol !== "http:" && proxy.protocol !== "https:") {
    throw new ImgpullError("PROXY", `a ${proxy.protocol}// proxy is not supported: only http:// and https:// ones are`);
  }
  return proxy;
}
function proxyHeaders(proxy) {
  if (proxy.username === "") return {};
  const credentials = `${decodeURIComponent(proxy.username)}:${decodeURIComponent(proxy.password)}`;
  return { "Proxy-Authorization": `Basic ${Buffer.from(credentials).toString("base64")}` };
}
function tunnelAgent(proxy, options, proxyTls, timeoutMs) {
  const agent = new https.Agent(options);
  const name = `${proxy.protocol}//${proxy.host}`;
  const createConnection = (target, callback) => {
    const authority = `${net.isIP(String(target.host)) === 6 ? `[${target.host}]` : target.host}:${target.port}`;
    const client = proxy.protocol === "https:" ? https : http;
    const connect2 = client.request(proxy, {
      ...proxyTls,
      method: "CONNECT",
      path: authority,
      agent: false,
      timeout: timeoutMs,
      headers: { Host: authority, ...proxyHeaders(proxy) }
    });
    connect2.once("connect", (response, socket) => {
      if (response.statusCode === 200) {
        callback(null, tls.connect({ ...target, socket }));
        return;
      }
      socket.destroy();
      const remedy = response.statusCode === 407 ? "\n  it wants credentials: http://USER:PASSWORD@HOST:PORT" : "";
      callback(new ImgpullError("PROXY", `the proxy ${name} refused CONNECT ${authority}: ${response.statusCode} ${printable(response.statusMessage ?? "")}${remedy}`, { status: response.statusCode }));
    });
    connect2.once("timeout", () => connect2.destroy(new ImgpullError("TIMEOUT", `the proxy ${name} is silent`)));
    connect2.once("error", (error) => callback(connectionError(error, `the proxy ${name}`)));
    connect2.end();
    return void 0;
  };
  return Object.assign(agent, { createConnection });
}
function createTransport(settings) {
  const contextFor = secureContexts(settings);
  const agents = /* @__PURE__ */ new Map();
  const keepAlive = { keepAlive: true, scheduling: "lifo" };
  const verify = { rejectUnauthorized: !settings.insecure };
  const makeAgent = async (url, isRegistry, proxy) => {
    const proxyTls = proxy?.protocol === "https:" ? { secureContext: await contextFor(proxy, false) } : {};
    if (url.protocol === "http:") return proxy?.protocol === "https:" ? new https.Agent({ ...keepAlive, ...proxyTls }) : new http.Agent(keepAlive);
    const options = { ...keepAlive, ...verify, secureContext: await contextFor(url, isRegistry) };
    return proxy ? tunnelAgent(proxy, options, proxyTls, settings.timeoutMs) : new https.Agent(options);
  };
  const send = async (request) => {
    const { url, method, signal } = request;
    const doing = `${method} ${redactUrl(url)}`;
    const proxy = proxyFor(url, settings.environment);
    const key = `${url.protocol} ${request.isRegistry ? url.host : ""} ${proxy?.href ?? ""}`;
    const agent = agents.get(key) ?? makeAgent(url, request.isRegistry, proxy);
    agents.set(key, agent);
    const forwarded = proxy && url.protocol === "http:" ? proxy : void 0;
    const options = {
      method,
      signal,
      agent: await agent,
      timeout: settings.timeoutMs,
      headers: { ...request.headers, ...forwarded ? { Host: url.host, ...proxyHeaders(forwarded) } : {} },
      ...forwarded ? { path: url.href } : {}
    };
    const client = (forwarded ?? url).protocol === "https:" ? https : http;
    return await new Promise((resolve, reject) => {
      const outgoing = client.request(forwarded ?? url, options);
      let incoming;
      outgoing.once("response", (response) => resolve(incoming = response));
      outgoing.once("error", (error) => {
        const lost = outgoing.reusedSocket && errorCodeOf(error) === "ECONNRESET" && incoming === void 0;
        if (lost) resolve(send(request));
        else reject(connectionError(error, doing));
      });
      outgoing.on("timeout", () => {
        if (incoming?.isPaused()) outgoing.setTimeout(settings.timeoutMs);
        else {
          const silent = new ImgpullError("TIMEOUT", `${doing}: nothing came for ${settings.timeoutMs / 1e3} s`);
          (incoming ?? outgoing).destroy(silent);
        }
      });
      outgoing.end(request.body);
    });
  };
  return {
    send,
    close: () => {
      for (const agent of agents.values()) void agent.then((ready) => ready.destroy(), () => void 0);
    }
  };
}
async function readBody(response, maximumBytes, what) {
  const tooLarge = () => {
    response.destroy();
    return new ImgpullError("TOO_LARGE", `${what} is larger than ${maximumBytes} bytes`);
  };
  if (Number(response.headers["content-length"]) > maximumBytes) throw tooLarge();
  const chunks = [];
  let length = 0;
  try {
    for await (const chunk of decodeBody(response, void 0)) {
      length += chunk.length;
      if (length > maximumBytes) throw tooLarge();
      chunks.push(chunk);
    }
  } catch (error) {
    throw connectionError(error, what);
  }
  return Buffer.concat(chunks);
}
function decodeBody(response, expectedBytes) {
  const encoding = response.headers["content-encoding"]?.toLowerCase();
  const length = response.headers["content-length"];
  if (expectedBytes !== void 0 && Number(length) === expectedBytes) return response;
  const decoder = encoding === "gzip" || encoding === "x-gzip" ? zlib.createGunzip() : encoding === "deflate" ? zlib.createInflate() : encoding === "br" ? zlib.createBrotliDecompress() : void 0;
  if (!decoder) return response;
  response.once("error", (error) => decoder.destroy(error));
  decoder.once("close", () => response.destroy());
  return response.pipe(decoder);
}
async function followRedirects(transport, journey) {
  let url = journey.start;
  for (let hop = 0; ; hop += 1) {
    const authorization = await journey.authorizationFor(url.origin);
    const response = await transport.send({
      method: journey.method,
      url,
      signal: journey.signal,
      isRegistry: journey.isRegistry(url.origin),
      headers: {
        "User-Agent": `imgpull/${"1.0.0"}`,
        "Accept-Encoding": "identity",
        ...journey.headers,
        ...authorization === void 0 ? {} : { Authorization: authorization }
      },
      ...journey.body === void 0 ? {} : { body: journey.body }
    });
    const status = response.statusCode ?? 0;
    const common = { status, headers: response.headers, url, authorization };
    const location = response.headers.location;
    const isRedirect = [301, 302, 303, 307, 308].includes(status) && location !== void 0 && journey.body === void 0;
    if (!isRedirect) {
      if (status >= 200 && status < 300) return { ...common, body: response, words: "" };
      return { ...common, words: await readWords(response) };
    }
    response.on("error", () => void 0).resume();
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
async function readWords(response) {
  const body = await readBody(response, LIMITS.errorBodyBytes, "the error's body").catch((error) => {
    if (error.code === "ABORTED") throw error;
    return Buffer.alloc(0);
  });
  const text = body.toString("utf8");
  try {
    const json2 = JSON.parse(text);
    const errors = Array.isArray(json2.errors) ? json2.errors : [];
    const first = isRecord(errors[0]) ? errors[0] : {};
    const words = [first.code, first.message, json2.details, json2.message, json2.error_description, json2.error];
    return printable(words.filter((word) => typeof word === "string" && word !== "").slice(0, 2).join(": "));
  } catch {
    return /^\s*</.test(text) ? "" : printable(text);
  }
}
var systemClock = {
  now: Date.now,
  random: Math.random,
  sleep: async (milliseconds, signal) => {
    await delay(milliseconds, void 0, { signal }).catch((error) => {
      throw connectionError(error, "waiting");
    });
  }
};
function parseRetryAfter(value, now) {
  if (value === void 0) return void 0;
  if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1e3;
  const date = Date.parse(value);
  return Number.isNaN(date) ? void 0 : Math.max(0, date - now);
}
function isRetriable(error) {
  if (!(error instanceof ImgpullError)) return false;
  if (error.code === "NETWORK") return errorCodeOf(error.cause) !== "ENOTFOUND";
  if (error.code === "TIMEOUT" || error.code === "RATE_LIMITED" || error.retryAfterMs !== void 0) return true;
  const status = error.code === "PROTOCOL" || error.code === "PROXY" ? error.status ?? 0 : 0;
  return status === 408 || status === 425 || status >= 500 && status !== 501 && status !== 505;
}
function retryDelayMs(error, failures, retries, random) {
  if (!isRetriable(error) || failures > retries) return void 0;
  if (error.retryAfterMs !== void 0 && error.retryAfterMs > LIMITS.retryAfterMs) return void 0;
  const ceiling = Math.min(LIMITS.backoffMs, LIMITS.firstBackoffMs * 2 ** (failures - 1));
  return Math.max(error.retryAfterMs ?? 0, Math.round(ceiling * (0.5 + random / 2)));
}
async function withRetries(session, signal, attempt, gotOn = () => false) {
  const { clock, settings } = session;
  for (let failures = 1; ; failures += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (signal.aborted) throw new ImgpullError("ABORTED", "stopped", { cause: error });
      if (gotOn()) failures = 1;
      const waitMs = retryDelayMs(error, failures, settings.retries, clock.random());
      if (waitMs === void 0) throw error;
      const said = error.message.split("\n")[0];
      session.warn(`${said}; trying again in ${(waitMs / 1e3).toFixed(1)} s (${failures} of ${settings.retries})`);
      await clock.sleep(waitMs, signal);
    }
  }
}
function parseChallenges(lines) {
  const challenges = [];
  for (const line of lines) {
    const token = /\s*,*\s*([!#$%&'*+.^_`|~0-9A-Za-z/-]+=*)(?:\s*=\s*("(?:[^"\\]|\\.)*"?|[^\s,"]*))?/y;
    let current;
    for (let match = token.exec(line); match !== null && match[0].trim() !== ""; match = token.exec(line)) {
      const [, name = "", value] = match;
      if (value !== void 0 && current) {
        const unquoted = value.startsWith('"') ? value.replace(/^"|"$/g, "").replace(/\\(.)/g, "$1") : value;
        current.parameters[name.toLowerCase()] ??= unquoted;
      } else {
        const isToken68 = current !== void 0 && Object.keys(current.parameters).length === 0 && name.endsWith("=");
        if (!isToken68) challenges.push(current = { scheme: name.toLowerCase(), parameters: {} });
      }
    }
  }
  return challenges;
}
var HUB_KEY = "https://index.docker.io/v1/";
function normalizeAuthKey(key) {
  const bare = key.replace(/^https?:\/\//, "").replace(/\/(v1|v2)?\/?$/, "");
  const [host = "", ...rest] = bare.split("/");
  return [DOCKER_HUB_HOSTS.includes(host) ? "docker.io" : host, ...rest].join("/");
}
function decodeAuthEntry(entry, source) {
  const text = (name) => typeof entry[name] === "string" ? entry[name] : "";
  const decoded = text("auth") === "" ? "" : Buffer.from(text("auth"), "base64").toString("utf8").replace(/\0+$/, "");
  const colon = decoded.indexOf(":");
  if (text("auth") !== "" && colon < 0) throw new ImgpullError("CREDENTIALS", `${source}: its "auth" is not USER:PASSWORD in base64`);
  const username = colon < 0 ? text("username") : decoded.slice(0, colon);
  const password = colon < 0 ? text("password") : decoded.slice(colon + 1);
  const make = (kind, secret) => ({ kind, username, secret, source, stored: true });
  if (text("identitytoken") !== "") return make("identity", text("identitytoken"));
  if (text("registrytoken") !== "") return make("bearer", text("registrytoken"));
  return username === "" && password === "" ? void 0 : make("basic", password);
}
async function runCredentialHelper(session, name, server) {
  const program = `docker-credential-${name}`;
  const refuse = (reason, cause) => new ImgpullError("CREDENTIALS", `the credential helper ${printable(program)} ${reason}`, { cause });
  if (!/^[\w.+-]+$/.test(name)) throw refuse("has a name that is not one");
  const { exitCode, stdout, stderr } = await new Promise(
    (resolve, reject) => {
      const child = spawn(program, ["get"], { signal: session.signal, stdio: ["pipe", "pipe", "pipe"], timeout: 6e4 });
      const output = { stdout: "", stderr: "" };
      for (const stream of ["stdout", "stderr"]) {
        child[stream].setEncoding("utf8").on("data", (text) => {
          if (output[stream].length < LIMITS.tokenBytes) output[stream] += text;
        });
      }
      child.once("error", reject);
      child.once("close", (code) => resolve({ exitCode: code, ...output }));
      child.stdin.on("error", () => void 0).end(server);
    }
  ).catch((error) => {
    if (session.signal.aborted) throw new ImgpullError("ABORTED", "stopped", { cause: error });
    throw refuse(`cannot be run: ${errorCodeOf(error) === "ENOENT" ? "it is not on the PATH" : errorCodeOf(error)}`, error);
  });
  if (exitCode !== 0) {
    const words = printable(stdout || stderr);
    if (/credentials not found|no credentials|could not be found|not found in/i.test(words)) return void 0;
    throw refuse(`failed: ${words || `exit code ${exitCode}`}`);
  }
  let answer;
  try {
    answer = JSON.parse(stdout);
  } catch {
    throw refuse("answered what is not JSON");
  }
  if (!isRecord(answer) || typeof answer.Secret !== "string") throw refuse("answered without a Secret");
  const username = typeof answer.Username === "string" ? answer.Username : "";
  if (username === "" && answer.Secret === "") return void 0;
  const kind = username === "<token>" ? "identity" : "basic";
  return { kind, username: kind === "identity" ? "" : username, secret: answer.Secret, source: program, stored: true };
}
async function credentialInFile(session, text, source, reference) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new ImgpullError("CREDENTIALS", `${source} is not JSON`);
  }
  if (!isRecord(file)) throw new ImgpullError("CREDENTIALS", `${source} is not a JSON object`);
  const server = reference.host === "docker.io" ? HUB_KEY : reference.host;
  const helpers = isRecord(file.credHelpers) ? file.credHelpers : {};
  const wanted = `${reference.host}/${reference.repository}`;
  const bestOf = (keys) => keys.filter((key) => `${wanted}/`.startsWith(`${normalizeAuthKey(key)}/`)).sort((left, right) => normalizeAuthKey(right).length - normalizeAuthKey(left).length)[0];
  const helperKey = bestOf(Object.keys(helpers));
  const helper = helperKey === void 0 ? file.credsStore : helpers[helperKey];
  if (typeof helper === "string" && helper !== "") {
    const found = await runCredentialHelper(session, helper, server);
    if (found) return found;
  }
  const auths = isRecord(file.auths) ? file.auths : {};
  const authKey = bestOf(Object.keys(auths).filter((key) => isRecord(auths[key]) && Object.keys(auths[key]).length > 0));
  return authKey === void 0 ? void 0 : decodeAuthEntry(auths[authKey], source);
}
async function findCredential(session, reference) {
  const { settings, environment } = session;
  const given = { source: "--user and --password", stored: false };
  if (settings.token !== void 0) return { kind: "outside", username: "", secret: settings.token, source: "--token", stored: false };
  if (settings.username !== void 0) {
    return { kind: "basic", username: settings.username, secret: settings.password ?? "", ...given };
  }
  const home = environment.HOME ?? os.homedir();
  const named = environment.REGISTRY_AUTH_FILE;
  const places = [
    ["DOCKER_AUTH_CONFIG", environment.DOCKER_AUTH_CONFIG],
    [path.join(environment.DOCKER_CONFIG || path.join(home, ".docker"), "config.json"), void 0],
    ...environment.XDG_RUNTIME_DIR ? [[path.join(environment.XDG_RUNTIME_DIR, "containers/auth.json"), void 0]] : [],
    [path.join(home, ".config/containers/auth.json"), void 0]
  ];
  if (named) places.unshift([named, void 0]);
  for (const [source, inline] of places) {
    const isVariable = source === "DOCKER_AUTH_CONFIG";
    const text = isVariable ? inline : await readCredentialFile(source, source === named);
    if (!text) continue;
    const found = await credentialInFile(session, text, source, reference);
    if (found) return found;
  }
  return void 0;
}
async function readCredentialFile(file, isRequired) {
  try {
    const { size } = await fs.stat(file);
    if (size > LIMITS.credentialFileBytes) throw new ImgpullError("CREDENTIALS", `${file} is larger than a credential file`);
    return await fs.readFile(file, "utf8");
  } catch (error) {
    const code = errorCodeOf(error);
    if (!isRequired && (code === "ENOENT" || code === "ENOTDIR" || code === "ERR_ACCESS_DENIED")) return void 0;
    if (error instanceof ImgpullError) throw error;
    const name = isRequired ? `REGISTRY_AUTH_FILE names ${file}` : `the credential file ${file}`;
    throw new ImgpullError("CREDENTIALS", `${name}: ${DISK_WORDS[code] ?? code}`, { cause: error });
  }
}
function basicAuthorization(credential) {
  return `Basic ${Buffer.from(`${credential.username}:${credential.secret}`, "utf8").toString("base64")}`;
}
async function fetchToken(session, origin, scope, challenge, credential) {
  const { realm = "", service } = challenge.parameters;
  if (realm === "" || !URL.canParse(realm, `${origin}/`)) {
    throw new ImgpullError("PROTOCOL", `${origin} asks for a token without saying where (no usable realm)`);
  }
  const url = new URL(realm, `${origin}/`);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && origin.startsWith("http:"))) {
    throw new ImgpullError("PROTOCOL", `${origin} names the token endpoint ${redactUrl(url)}: not over ${url.protocol}`);
  }
  const ask = async (method, start, authorization, body) => await followRedirects(session.transport, {
    method,
    start,
    signal: session.signal,
    headers: body === void 0 ? {} : { "Content-Type": "application/x-www-form-urlencoded" },
    ...body === void 0 ? {} : { body },
    authorizationFor: async (target) => target === start.origin ? authorization : void 0,
    isRegistry: (target) => target === origin
  });
  let answer;
  if (credential?.kind === "identity") {
    const form = new URLSearchParams({
      grant_type: "refresh_token",
      ...service ? { service } : {},
      scope,
      client_id: "imgpull",
      refresh_token: credential.secret
    });
    answer = await ask("POST", url, void 0, form.toString());
    if ([400, 401, 404, 405].includes(answer.status) || answer.status >= 300 && answer.status < 400) answer = void 0;
  }
  if (!answer) {
    const query = new URL(url);
    if (service) query.searchParams.set("service", service);
    query.searchParams.set("scope", scope);
    const username = credential?.username || "00000000-0000-0000-0000-000000000000";
    answer = await ask("GET", query, credential && basicAuthorization({ ...credential, username }));
  }
  if (!answer.body) throw statusError(answer, session.clock.now(), "the token service");
  const text = (await readBody(answer.body, LIMITS.tokenBytes, `the token of ${redactUrl(url)}`)).toString("utf8");
  let token;
  let expiresIn;
  try {
    const json2 = JSON.parse(text);
    token = json2.token || json2.access_token;
    expiresIn = json2.expires_in;
  } catch {
    token = void 0;
  }
  if (typeof token !== "string" || !/^[\x21-\x7e]+$/.test(token)) {
    throw new ImgpullError("PROTOCOL", `${redactUrl(url)} answered without a token`);
  }
  const lifeMs = Math.max(LIMITS.tokenFloorMs, typeof expiresIn === "number" ? expiresIn * 1e3 : 0);
  return { header: `Bearer ${token}`, expiresAt: session.clock.now() + lifeMs };
}
function statusError(answer, now, who = "the registry", isRegistry = true) {
  const { status } = answer;
  const retryAfterMs = parseRetryAfter(answer.headers["retry-after"], now);
  const said = `${redactUrl(answer.url)}: ${who} answered ${status}${answer.words ? ` (${answer.words})` : ""}`;
  if (status === 429) {
    const when = retryAfterMs === void 0 ? "try again later" : `come back in ${Math.ceil(retryAfterMs / 1e3)} s, at ${new Date(now + Math.min(retryAfterMs, 1e12)).toISOString()}`;
    return new ImgpullError("RATE_LIMITED", `${said}
  too many requests: ${when}`, { status, retryAfterMs });
  }
  const isExpired = !isRegistry && [400, 401, 403].includes(status);
  const code = status === 401 ? "UNAUTHORIZED" : status === 403 ? "FORBIDDEN" : status === 404 ? "NOT_FOUND" : "PROTOCOL";
  const plainOnTls = /HTTP request (was sent )?to (an )?HTTPS/i.test(answer.words) ? "\n  try without --scheme http" : "";
  return new ImgpullError(code, said + plainOnTls, { status, retryAfterMs: isExpired ? 0 : status >= 500 ? retryAfterMs : void 0 });
}
var Registry = class {
  origin;
  reference;
  /** False once it has answered a range with the whole. */
  acceptsRanges = true;
  /** The quickest answer so far: how far away it is. */
  latencyMs = Number.POSITIVE_INFINITY;
  #session;
  #held = /* @__PURE__ */ new Map();
  #renewals = /* @__PURE__ */ new Map();
  #isAnonymous = false;
  constructor(session, reference) {
    this.#session = session;
    this.reference = reference;
    this.origin = new URL(`${session.settings.scheme}://${apiHost(reference.host)}`).origin;
    if (session.settings.token !== void 0) {
      const header = `Basic ${session.settings.token}`;
      this.#held.set(this.origin, { header, expiresAt: Number.POSITIVE_INFINITY });
    }
  }
  url(rest) {
    const url = new URL(`${this.origin}/v2/${this.reference.repository}/${rest}`);
    if (this.#session.settings.namespace !== void 0) url.searchParams.set("ns", this.#session.settings.namespace);
    return url;
  }
  async #credential() {
    if (this.#isAnonymous) return void 0;
    const key = `${this.reference.host}/${this.reference.repository}`;
    const found = this.#session.credentials.get(key) ?? findCredential(this.#session, this.reference);
    this.#session.credentials.set(key, found);
    return await found;
  }
  /** One answer to one request, after at most one handshake and one renewal or fallback. */
  async request(method, start, headers, signal) {
    for (let round = 0; ; round += 1) {
      const answer = await followRedirects(this.#session.transport, {
        method,
        start,
        headers,
        signal,
        authorizationFor: async (origin) => await this.#authorizationFor(origin),
        isRegistry: (origin) => origin === this.origin
      });
      const { status, authorization: sent } = answer;
      const mayBeStale = status === 401 || status === 400 && sent?.startsWith("Bearer ") === true || status === 403 && sent !== void 0;
      if (!mayBeStale || round === 3 || !await this.#authorize(answer, round)) return answer;
    }
  }
  async #authorizationFor(origin) {
    const held = this.#held.get(origin);
    if (held && held.expiresAt > this.#session.clock.now()) return held.header;
    const challenges = this.#session.challenges.get(origin);
    const isTokenAsked = challenges?.some((challenge) => challenge.scheme === "bearer") === true;
    if (challenges && isTokenAsked) await this.#once(origin, async () => await this.#handshake(origin, challenges));
    return this.#held.get(origin)?.header;
  }
  /** Connections that are refused at the same time get one new token between them. */
  async #once(origin, renew) {
    const running = this.#renewals.get(origin) ?? renew().finally(() => this.#renewals.delete(origin));
    this.#renewals.set(origin, running);
    return await running;
  }
  /** Whether another attempt may go better than the one that got `answer`. */
  async #authorize(answer, round) {
    const { origin } = answer.url;
    const { authorization: sent, status } = answer;
    if (this.#held.get(origin)?.header !== sent) return true;
    const header = answer.headers["www-authenticate"];
    const challenges = parseChallenges([header ?? []].flat());
    if (challenges.length > 0) this.#session.challenges.set(origin, challenges);
    const known2 = challenges.length > 0 ? challenges : this.#session.challenges.get(origin) ?? [];
    const credential = origin === this.origin ? await this.#credential() : void 0;
    if (credential?.kind === "outside") return false;
    const isRefused = status === 403 || round > 0 && sent !== void 0 || (sent?.startsWith("Basic ") ?? false);
    if (isRefused) {
      if (!credential?.stored) return false;
      this.#giveUp(credential, `${redactUrl(answer.url)}: ${status}`);
    }
    return await this.#once(origin, async () => await this.#handshake(origin, known2));
  }
  #giveUp(credential, reason) {
    this.#isAnonymous = true;
    this.#held.delete(this.origin);
    this.#session.warn(`the credentials of ${credential.source} were refused (${reason}); trying without any`);
  }
  async #handshake(origin, challenges) {
    const credential = origin === this.origin ? await this.#credential() : void 0;
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
        const status = error instanceof ImgpullError ? error.status ?? 0 : 0;
        if (!credential || ![400, 401, 403, 404].includes(status)) throw error;
        if (!credential.stored) {
          throw new ImgpullError("UNAUTHORIZED", `${error.message}
  refused: ${credential.source}`, { status, cause: error });
        }
        this.#giveUp(credential, error.message);
        this.#held.set(origin, await fetchToken(this.#session, origin, scope, bearer, void 0));
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
  async #refusal(answer, what) {
    const isRegistry = answer.url.origin === this.origin;
    const error = statusError(answer, this.#session.clock.now(), isRegistry ? "the registry" : "the storage host", isRegistry);
    if (error.code === "NOT_FOUND") {
      const isRepository = /NAME_UNKNOWN|repository name not known/i.test(answer.words);
      const missing = isRepository ? `no such repository: ${this.reference.host}/${this.reference.repository}` : `no such ${what}`;
      return new ImgpullError("NOT_FOUND", `${missing}
  ${error.message}`, { status: answer.status });
    }
    if (error.code !== "UNAUTHORIZED" && error.code !== "FORBIDDEN") return error;
    if (error.retryAfterMs !== void 0) return error;
    const credential = await this.#credential();
    const tried = this.#isAnonymous ? "the stored credentials were refused, and so was a request without any" : credential ? `tried the credentials of ${credential.source}` : "no credentials were found for this registry (--user, --token, or docker login)";
    const maybe = credential ? "" : "; a repository that does not exist is often answered the same way";
    return new ImgpullError(error.code, `${error.message}
  ${tried}${maybe}`, { status: answer.status });
  }
  /** The manifest of a tag or digest, verified against the digest where one was asked for. */
  async manifest(tagOrDigest) {
    const url = this.url(`manifests/${tagOrDigest}`);
    const what = isDigest(tagOrDigest) ? `manifest: ${tagOrDigest}` : `tag: ${formatReference({ ...this.reference, tag: tagOrDigest })}`;
    return await withRetries(this.#session, this.#session.signal, async () => {
      const startedAt = performance.now();
      const answer = await this.request("GET", url, { Accept: MANIFEST_TYPES.join(", ") }, this.#session.signal);
      if (!answer.body) throw await this.#refusal(answer, what);
      this.latencyMs = Math.min(this.latencyMs, performance.now() - startedAt);
      const bytes = await readBody(answer.body, LIMITS.manifestBytes, `the manifest ${redactUrl(url)}`);
      const digest = digestOf(bytes, isDigest(tagOrDigest) ? tagOrDigest : void 0);
      if (isDigest(tagOrDigest) && digest !== tagOrDigest) {
        throw new ImgpullError("DIGEST_MISMATCH", `${redactUrl(url)}: the manifest's bytes have the digest ${digest}`);
      }
      return { mediaType: sniffMediaType(bytes, answer, this.reference.host), digest, bytes };
    });
  }
  async head(tagOrDigest) {
    const url = this.url(`manifests/${tagOrDigest}`);
    return await withRetries(this.#session, this.#session.signal, async () => {
      const answer = await this.request("HEAD", url, { Accept: MANIFEST_TYPES.join(", ") }, this.#session.signal);
      if (!answer.body) throw await this.#refusal(answer, `tag: ${formatReference(this.reference)}`);
      answer.body.resume();
      const digest = answer.headers["docker-content-digest"];
      const length = answer.headers["content-length"];
      const mediaType = (answer.headers["content-type"] ?? "").split(";")[0]?.trim() ?? "";
      const isWhole = isDigest(digest) && length !== void 0 && MANIFEST_TYPES.includes(mediaType);
      return isWhole ? { mediaType, digest, size: Number(length) } : void 0;
    });
  }
  /** One answer with a blob's bytes from `from` up to, not including, `to`. The caller checks what came. */
  async blob(descriptor, from, to, signal) {
    const isWhole = from === 0 && to === descriptor.size;
    const headers = isWhole ? {} : { Range: `bytes=${from}-${to - 1}` };
    const answer = await this.request("GET", this.url(`blobs/${descriptor.digest}`), headers, signal);
    if (answer.body) return answer;
    if (answer.status !== 404 || descriptor.urls === void 0) throw await this.#refusal(answer, `blob: ${descriptor.digest}`);
    let refusal = answer;
    for (const text of descriptor.urls) {
      const url = URL.canParse(text) ? new URL(text) : void 0;
      if (url?.protocol !== "https:") continue;
      refusal = await followRedirects(this.#session.transport, {
        method: "GET",
        start: url,
        headers,
        signal,
        authorizationFor: async () => void 0,
        isRegistry: () => false
      });
      if (refusal.body) return refusal;
    }
    throw statusError(refusal, this.#session.clock.now(), "the foreign layer's host");
  }
};
function sniffMediaType(bytes, answer, host) {
  const header = (answer.headers["content-type"] ?? "").split(";")[0]?.trim().toLowerCase() ?? "";
  const refuse = () => {
    throw new ImgpullError("PROTOCOL", `${redactUrl(answer.url)}: the answer is not a manifest${header ? ` but ${printable(header)}` : ""}: is ${host} a registry?`, { status: answer.status });
  };
  let json2;
  try {
    json2 = JSON.parse(bytes.toString("utf8"));
  } catch {
    refuse();
  }
  if (!isRecord(json2)) return refuse();
  if (typeof json2.mediaType === "string") return json2.mediaType;
  if (MANIFEST_TYPES.includes(header)) return header;
  if (json2.schemaVersion === 1) return "application/vnd.docker.distribution.manifest.v1+json";
  if (Array.isArray(json2.manifests)) return OCI_INDEX;
  return isRecord(json2.config) ? OCI_MANIFEST : refuse();
}
function parseDescriptor(value, where) {
  const refuse = (reason) => {
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
    ...isUrlList && urls.length > 0 ? { urls } : {},
    ...isRecord(platform) ? { platform: parsePlatform(platform) } : {}
  };
}
function parsePlatform(value) {
  const word = (name) => typeof value[name] === "string" ? printable(value[name], 64) : "";
  const variant = word("variant");
  return { os: word("os"), architecture: word("architecture"), ...variant ? { variant } : {} };
}
function parseManifest(fetched, where) {
  const json2 = JSON.parse(fetched.bytes.toString("utf8"));
  const { mediaType } = fetched;
  if (!isRecord(json2)) throw new ImgpullError("PROTOCOL", `${where}: the manifest is not a JSON object`);
  if (json2.schemaVersion === 1 || mediaType.startsWith("application/vnd.docker.distribution.manifest.v1")) {
    throw new ImgpullError("UNSUPPORTED", `${where}: a schema 1 manifest; Docker itself has given that format up. Push the image anew`);
  }
  if (mediaType === "application/vnd.oci.artifact.manifest.v1+json") {
    throw new ImgpullError("UNSUPPORTED", `${where}: an OCI artifact manifest, a draft that the specification has withdrawn`);
  }
  const isIndex = Array.isArray(json2.manifests);
  const isImage2 = isRecord(json2.config) && Array.isArray(json2.layers);
  const saysIndex = mediaType === OCI_INDEX || mediaType === DOCKER_INDEX;
  if (isIndex === isImage2 || isIndex && Array.isArray(json2.layers) || isIndex !== saysIndex && MANIFEST_TYPES.includes(mediaType)) {
    throw new ImgpullError("PROTOCOL", `${where}: ${printable(mediaType, 100)} with the fields of something else`);
  }
  if (isIndex) {
    const manifests = json2.manifests;
    if (manifests.length > LIMITS.indexEntries) {
      throw new ImgpullError("TOO_LARGE", `${where}: an index of more than ${LIMITS.indexEntries} entries`);
    }
    return { kind: "index", manifests: manifests.map((entry) => parseDescriptor(entry, where)) };
  }
  const config = parseDescriptor(json2.config, where);
  if (config.size > LIMITS.configBytes) {
    throw new ImgpullError("TOO_LARGE", `${where}: its config of ${config.size} bytes is larger than ${LIMITS.configBytes}`);
  }
  return { kind: "image", config, layers: json2.layers.map((layer) => parseDescriptor(layer, where)) };
}
function hostPlatform() {
  const systems = { win32: "windows", sunos: "solaris" };
  const processors = { x64: "amd64", ia32: "386", mipsel: "mipsle" };
  const littlePower = process.arch === "ppc64" && os.endianness() === "LE" ? "ppc64le" : void 0;
  const variables = process.config.variables;
  const armVersion = process.arch === "arm" ? String(variables.arm_version ?? "7") : void 0;
  return {
    os: systems[process.platform] ?? process.platform,
    architecture: littlePower ?? processors[process.arch] ?? process.arch,
    ...armVersion === void 0 ? {} : { variant: `v${armVersion}` }
  };
}
function acceptableVariants(architecture, variant) {
  const downFrom = (highest, lowest) => Array.from({ length: Math.max(0, highest - lowest + 1) }, (_, index) => `v${highest - index}`);
  const level = /^v(\d{1,2})$/.exec(variant ?? "")?.[1];
  if (architecture === "arm") {
    if (variant === void 0) return ["", ...downFrom(7, 5)];
    return level === void 0 ? [variant] : downFrom(Number(level), 5).flatMap((each) => each === "v7" ? [each, ""] : [each]);
  }
  const base = architecture === "arm64" ? 8 : 1;
  if (architecture === "arm64" || architecture === "amd64") {
    if (variant === void 0) return ["", `v${base}`];
    return level === void 0 ? [variant] : [...downFrom(Number(level), base), ""];
  }
  return variant === void 0 ? ["", "*"] : [variant];
}
function matchPlatform(candidates, wanted) {
  const fitting = candidates.filter(
    ({ platform }) => platform?.os === wanted.os && platform.architecture === wanted.architecture
  );
  for (const variant of acceptableVariants(wanted.architecture, wanted.variant)) {
    const found = fitting.find(({ platform }) => variant === "*" || (platform?.variant ?? "") === variant);
    if (found) return found;
  }
  return void 0;
}
function isAttestation(entry) {
  return entry.platform?.os === "unknown" || entry.platform?.architecture === "unknown";
}
function isIndexType(mediaType) {
  return mediaType === OCI_INDEX || mediaType === DOCKER_INDEX;
}
function wantedPlatform(wanted, host = hostPlatform()) {
  const variant = wanted.variant ?? (wanted.architecture === void 0 ? host.variant : void 0);
  return {
    os: wanted.os ?? host.os,
    architecture: wanted.architecture ?? host.architecture,
    ...variant === void 0 ? {} : { variant }
  };
}
var BLOCK = 512;
function paddingOf(sizeBytes) {
  return (BLOCK - sizeBytes % BLOCK) % BLOCK;
}
function encodeUstarHeader(name, sizeBytes, type) {
  const octal = (value, width) => `${value.toString(8).padStart(width - 1, "0")}\0`;
  const fields = [
    [100, name],
    [8, octal(420, 8)],
    [8, octal(0, 8)],
    [8, octal(0, 8)],
    [12, octal(sizeBytes, 12)],
    [12, octal(0, 12)],
    [8, " ".repeat(8)],
    [1, type],
    [100, ""],
    [6, "ustar\0"],
    [2, "00"],
    [32, ""],
    [32, ""],
    [8, octal(0, 8)],
    [8, octal(0, 8)],
    [155, ""],
    [12, ""]
  ];
  const header = Buffer.concat(fields.map(([width, text]) => Buffer.concat([Buffer.from(text, "latin1")], width)));
  const checksum = header.reduce((sum, byte) => sum + byte, 0);
  header.write(`${checksum.toString(8).padStart(6, "0")}\0 `, 148, "latin1");
  return header;
}
function encodeTarHeader(name, sizeBytes) {
  const record = (key, value) => {
    const rest = ` ${key}=${value}
`;
    let length = rest.length;
    while (`${length}`.length + rest.length !== length) length = `${length}`.length + rest.length;
    return `${length}${rest}`;
  };
  const isLong = name.length > 100;
  const isLarge = sizeBytes > 8589934591;
  const plain = encodeUstarHeader(name.slice(0, 100), isLarge ? 0 : sizeBytes, "0");
  if (!isLong && !isLarge) return plain;
  const records = (isLong ? record("path", name) : "") + (isLarge ? record("size", String(sizeBytes)) : "");
  const padded = Buffer.concat([Buffer.from(records, "latin1")], records.length + paddingOf(records.length));
  return Buffer.concat([encodeUstarHeader("PaxHeaders/blob", records.length, "x"), padded, plain]);
}
function isImage(content) {
  return IMAGE_CONFIG_TYPES.includes(content.manifest.config.mediaType);
}
function indexEntry(image) {
  const annotations = { "io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": image.name };
  return { mediaType: image.top.mediaType, digest: image.top.digest, size: image.top.bytes.length, annotations };
}
function dockerEntries(images) {
  return images.flatMap((image) => {
    const loadable = image.contents.filter(isImage);
    const content = loadable.find(({ platform }) => formatPlatform(platform) === "linux/amd64") ?? loadable[0];
    if (!content) return [];
    const { config, layers } = content.manifest;
    const tags = image.name.includes("@") ? [] : [image.name];
    return [{ Config: blobPath(config.digest), RepoTags: tags, Layers: layers.map((layer) => blobPath(layer.digest)) }];
  });
}
var json = (value) => Buffer.from(JSON.stringify(value), "utf8");
function planTar(images, omit = /* @__PURE__ */ new Set()) {
  const index = { schemaVersion: 2, mediaType: OCI_INDEX, manifests: images.map(indexEntry) };
  const contents = /* @__PURE__ */ new Map([
    ["oci-layout", known(json({ imageLayoutVersion: "1.0.0" }))],
    ["index.json", known(json(index))],
    ["manifest.json", known(json(dockerEntries(images)))]
  ]);
  const omitted = /* @__PURE__ */ new Map();
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
  const entries = [];
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
function known(bytes) {
  return { bytes, sizeBytes: bytes.length };
}
async function readAt(handle, position, length, buffer = Buffer.alloc(length)) {
  let filled = 0;
  while (filled < length) {
    const { bytesRead } = await handle.read(buffer, filled, length - filled, position + filled);
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return buffer.subarray(0, filled);
}
async function* readTar(handle, where) {
  const refuse = (reason) => {
    throw new ImgpullError("BAD_TAR", `${where}: ${reason}`);
  };
  const { size } = await handle.stat();
  let extended = {};
  for (let position = 0; position < size; ) {
    const header = await readAt(handle, position, BLOCK);
    if (header.length < BLOCK) return refuse("it ends in the middle of a header");
    if (header.every((byte) => byte === 0)) return;
    const text = (start, length) => header.toString("utf8", start, start + length).replace(/\0[^]*$/, "");
    const sum = header.reduce((total, byte, at) => total + (at >= 148 && at < 156 ? 32 : byte), 0);
    if (Number.parseInt(text(148, 8).trim(), 8) !== sum) return refuse("it is not a tar, or is damaged (a header's checksum is wrong)");
    const isBinary = ((header[124] ?? 0) & 128) !== 0;
    const plainSize = isBinary ? Number(header.readBigUInt64BE(128)) : Number.parseInt(text(124, 12).trim() || "0", 8);
    const type = text(156, 1) || "0";
    const isMeta = type === "x" || type === "g" || type === "L" || type === "K";
    const sizeBytes = !isMeta && extended.size !== void 0 ? Number(extended.size) : plainSize;
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
function parsePaxRecords(body) {
  const records = {};
  for (let at = 0; at < body.length; ) {
    const space = body.indexOf(32, at);
    const length = Number(body.toString("latin1", at, Math.max(space, at)));
    if (space < 0 || !Number.isInteger(length) || length <= space - at) break;
    const record = body.toString("utf8", space + 1, at + length - 1);
    const equals = record.indexOf("=");
    records[record.slice(0, equals)] = record.slice(equals + 1);
    at += length;
  }
  return records;
}
function digestInName(name) {
  const [, blob, bare] = /^(?:blobs\/(sha256\/[0-9a-f]{64}|sha512\/[0-9a-f]{128})|(?:sha256:)?([0-9a-f]{64})(?:\.json|\.tar|\.tar\.gz)?)$/.exec(name) ?? [];
  return blob?.replace("/", ":") ?? (bare === void 0 ? void 0 : `sha256:${bare}`);
}
async function openTarSource(file) {
  const handle = await fs.open(file, "r").catch((error) => {
    throw diskError(error, `cannot read ${file}`);
  });
  try {
    const blobs = /* @__PURE__ */ new Map();
    for await (const entry of readTar(handle, file)) {
      const digest = digestInName(entry.name);
      if (digest !== void 0 && (entry.type === "0" || entry.type === "7")) blobs.set(digest, entry);
    }
    return { file, handle, blobs };
  } catch (error) {
    await handle.close();
    throw error;
  }
}
function addRange(ranges, [from, to]) {
  const apart = ranges.filter(([start, end]) => end < from || start > to);
  const touching = ranges.filter(([start, end]) => end >= from && start <= to);
  const merged = [Math.min(from, ...touching.map(([start]) => start)), Math.max(to, ...touching.map(([, end]) => end))];
  return [...apart, merged].sort((left, right) => left[0] - right[0]);
}
function missingRanges(ranges, sizeBytes) {
  const edges = [0, ...ranges.flat(), sizeBytes];
  const gaps = [];
  for (let at = 0; at < edges.length; at += 2) gaps.push([edges[at], edges[at + 1]]);
  return gaps.filter(([from, to]) => from < to);
}
function newJob(descriptor, registry, offset) {
  return {
    descriptor,
    registry,
    offset,
    hash: newHash(descriptor.digest),
    hashedTo: 0,
    written: [],
    hashing: void 0,
    openSegments: 0,
    freshStarts: 1,
    doneBytes: 0,
    unrecordedBytes: 0,
    isDone: false
  };
}
function startAfresh(job) {
  Object.assign(job, { hash: newHash(job.descriptor.digest), hashedTo: 0, written: [], doneBytes: 0, hashing: void 0 });
}
function newSegment(job, at, to, isTakeover = false) {
  job.openSegments += isTakeover ? 0 : 1;
  return { job, at, to, isTakeover, startedAtMs: 0, firstByteMs: 0, receivedBytes: 0 };
}
async function fetchBlobs(session, transfer, sink) {
  const stop = new AbortController();
  const signal = AbortSignal.any([session.signal, stop.signal]);
  const { active } = transfer;
  const pending = [];
  let connections = session.settings.concurrency;
  let wake = [];
  const enqueue = (job) => {
    for (const [from, to] of missingRanges(job.written, job.descriptor.size)) {
      const unit = sink.unitBytes(job);
      for (let at = from; at < to; at += unit) pending.push(newSegment(job, at, Math.min(to, at + unit)));
    }
  };
  const remaining = (segment) => segment.to - segment.at;
  const cut = (victim) => {
    const middle = victim.at + Math.ceil(remaining(victim) / 2);
    const rest = newSegment(victim.job, middle, victim.to, true);
    victim.job.openSegments += 1;
    victim.to = middle;
    return rest;
  };
  const canCut = (segment) => sink.isSplitting && segment.job.registry.acceptsRanges && remaining(segment) >= 2 * LIMITS.splitBytes;
  const longest = (segments) => [...segments].filter(canCut).sort((left, right) => remaining(right) - remaining(left))[0];
  const isWorthTaking = (victim) => {
    const now = performance.now();
    const rate = (segment) => segment.receivedBytes / Math.max(1, now - segment.startedAtMs);
    const lineRate = [...active].reduce((sum, segment) => sum + rate(segment), 0);
    const latencyMs = Math.max(50, 4 * (victim.firstByteMs || now - victim.startedAtMs));
    if (lineRate * 1e3 > LIMITS.fastLineBytesPerSecond || now - victim.startedAtMs < 50) return false;
    return remaining(victim) / Math.max(rate(victim), 1) > latencyMs;
  };
  const take = () => {
    const next = pending.shift();
    if (next) return next;
    const victim = longest(active);
    return victim && isWorthTaking(victim) ? cut(victim) : void 0;
  };
  const idle = async () => {
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, 20);
      wake.push(() => (clearTimeout(timer), resolve()));
    });
  };
  const done = async (segment) => {
    const { job } = segment;
    job.openSegments -= 1;
    sink.segmentDone(job);
    if (job.openSegments > 0) return;
    if (!await sink.blobDone(job)) {
      startAfresh(job);
      enqueue(job);
      return;
    }
    job.isDone = true;
    transfer.changed(job);
  };
  const connection = async () => {
    while (!signal.aborted && (pending.length > 0 || active.size > 0)) {
      if (active.size >= connections) return;
      const segment = take();
      if (!segment) {
        await idle();
        continue;
      }
      active.add(segment);
      try {
        await fetchSegment(session, { transfer, sink, signal, pending, segment, slowDown: () => connections = Math.max(1, active.size - 1) });
      } finally {
        active.delete(segment);
        wake.forEach((resume) => resume());
        wake = [];
      }
      await done(segment);
    }
  };
  for (const job of transfer.jobs) if (!job.isDone) enqueue(job);
  const isFar = (segment) => segment.job.registry.latencyMs >= LIMITS.farLatencyMs;
  for (let victim = longest(pending.filter(isFar)); victim && pending.length < connections; victim = longest(pending.filter(isFar))) {
    pending.push(cut(victim));
  }
  if (sink.isSplitting) pending.sort((left, right) => remaining(right) - remaining(left));
  for (const job of transfer.jobs) if (!job.isDone && job.openSegments === 0) pending.push(newSegment(job, 0, 0));
  const lanes = Array.from({ length: connections }, async () => {
    try {
      await connection();
    } catch (error) {
      stop.abort();
      throw error;
    }
  });
  const results = await Promise.allSettled(lanes);
  const failures = results.flatMap((result) => result.status === "rejected" ? [result.reason] : []);
  if (session.signal.aborted) throw new ImgpullError("ABORTED", "stopped");
  const isStopped = (error) => error instanceof ImgpullError && error.code === "ABORTED";
  if (failures.length > 0) throw failures.find((failure) => !isStopped(failure)) ?? failures[0];
}
async function fetchSegment(session, run) {
  const { segment, transfer } = run;
  const { job } = segment;
  let before = segment.at;
  const gotOn = () => {
    const enough = segment.at - before >= Math.min(LIMITS.batchBytes, Math.ceil(job.descriptor.size / 64));
    before = segment.at;
    return enough;
  };
  const attempt = async () => {
    while (segment.at < segment.to) {
      try {
        await receive(run);
      } catch (error) {
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
async function receive(run) {
  const { segment, sink, transfer } = run;
  const { job } = segment;
  const { descriptor, registry } = job;
  segment.startedAtMs = performance.now();
  segment.receivedBytes = 0;
  const isRange = segment.at > 0 || segment.to < descriptor.size;
  const answer = await registry.blob(descriptor, segment.at, segment.to, run.signal);
  const body = answer.body;
  segment.firstByteMs = performance.now() - segment.startedAtMs;
  const doing = `GET ${redactUrl(answer.url)}`;
  const refuse = (error) => {
    body.destroy();
    throw error;
  };
  let position = 0;
  let end = descriptor.size;
  if (answer.status === 206) {
    const [, first, last, total] = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(String(answer.headers["content-range"])) ?? [];
    position = Number(first);
    end = Number(last) + 1;
    if (position !== segment.at || !(end > position && end <= descriptor.size) || total !== "*" && Number(total) !== descriptor.size) {
      refuse(new ImgpullError("PROTOCOL", `${doing}: asked for bytes ${segment.at}-${segment.to - 1} of ${descriptor.size}, got "${printable(String(answer.headers["content-range"]), 80)}"`, { status: 206 }));
    }
  } else if (isRange) {
    registry.acceptsRanges = false;
    if (!keepWhole(run)) return void body.destroy();
  }
  const stream = decodeBody(body, end - position);
  const length = answer.headers["content-length"];
  if (stream === body && length !== void 0 && Number(length) !== end - position) {
    refuse(new ImgpullError("SIZE_MISMATCH", `${doing}: ${length} bytes were announced where ${end - position} belong`));
  }
  let gathered = [];
  let gatheredBytes = 0;
  let isTooLong = false;
  let writing = Promise.resolve();
  const flush = async () => {
    const [chunks, from] = [gathered, segment.at - gatheredBytes];
    const previous = writing;
    gathered = [];
    gatheredBytes = 0;
    writing = previous.then(async () => await sink.write(job, from, chunks));
    writing.catch(() => void 0);
    await previous;
  };
  const take = (chunk) => {
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
    write: (chunk, _encoding, callback) => {
      take(chunk);
      if (isTooLong || segment.at >= segment.to && position < end) stream.destroy();
      if (gatheredBytes < LIMITS.batchBytes) return callback();
      transfer.changed();
      flush().then(() => callback(), callback);
    }
  });
  let failure;
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
function keepWhole({ segment, transfer, pending }) {
  const ofJob = (other) => other.job === segment.job && other !== segment;
  const owner = [...transfer.active].find((other) => ofJob(other) && other.to === segment.at && other.at < other.to);
  if (owner) {
    owner.to = segment.to;
    segment.to = segment.at;
    return false;
  }
  for (; ; ) {
    const next = pending.findIndex((other) => ofJob(other) && other.at === segment.to);
    const [follower] = next < 0 ? [] : pending.splice(next, 1);
    if (!follower) return true;
    segment.to = follower.to;
    segment.job.openSegments -= 1;
  }
}
async function hashPlace(handle, from, to, hash, each) {
  const buffer = Buffer.allocUnsafe(Math.min(LIMITS.batchBytes, to - from));
  for (let at = from; at < to; ) {
    const piece = await readAt(handle, at, Math.min(buffer.length, to - at), buffer);
    if (piece.length === 0) throw new ImgpullError("DISK", "a file became shorter while it was read");
    hash.update(piece);
    await each?.(piece, at);
    at += piece.length;
  }
}
async function writeAll(handle, chunks, position) {
  const total = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  const { bytesWritten } = await handle.writev(chunks, position);
  if (bytesWritten < total) await writeAll(handle, [Buffer.concat(chunks).subarray(bytesWritten)], position + bytesWritten);
}
async function openJournal(file, planId) {
  const [id, ...lines] = (await readOptional(file) ?? "").split("\n");
  const held = /* @__PURE__ */ new Map();
  for (const line of id === planId ? lines : []) {
    const [, digest, ranges] = /^(\S+) ((?:\d+-\d+,)*\d+-\d+);$/.exec(line) ?? [];
    if (digest && ranges) held.set(digest, ranges.split(",").map((range) => range.split("-").map(Number)));
  }
  const handle = await fs.open(file, id === planId ? "a" : "w");
  let writing = id === planId ? Promise.resolve() : handle.appendFile(`${planId}
`);
  return {
    held,
    record: (job) => {
      job.unrecordedBytes = 0;
      const line = `${job.descriptor.digest} ${job.written.map((range) => range.join("-")).join(",")};
`;
      writing = writing.then(async () => await handle.appendFile(line)).catch(() => void 0);
    },
    close: async () => {
      await writing.catch(() => void 0);
      await handle.close();
    }
  };
}
async function acquireLock(file, dest) {
  const mine = JSON.stringify({ pid: process.pid, host: os.hostname(), nonce: Math.random() });
  const isAlive = (pid) => {
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
    const text = await readOptional(file) ?? "";
    const owner = /^\{"pid":(\d+),"host":"([^"]*)"/.exec(text);
    const isOurs = Number(owner?.[1]) === process.pid;
    if (owner && (owner[2] !== os.hostname() || isOurs || isAlive(Number(owner[1])))) {
      throw new ImgpullError("DISK", `${dest} is being pulled by another imgpull (process ${owner[1]} on ${owner[2]})
  if that is not so, remove ${file}`);
    }
    await fs.writeFile(`${file}.${process.pid}`, mine);
    await fs.rename(`${file}.${process.pid}`, file);
    await delay(20);
    if (await readOptional(file) !== mine) throw new ImgpullError("DISK", `${dest} is being pulled by another imgpull`);
  }
  return async () => await fs.rm(file, { force: true });
}
function newTransfer(jobs, observe) {
  const transfer = {
    jobs,
    active: /* @__PURE__ */ new Set(),
    totalBytes: jobs.reduce((sum, job) => sum + job.descriptor.size, 0),
    fetchedBytes: 0,
    reusedBytes: 0,
    resumedBytes: 0,
    changed: (finished) => observe(transfer, finished)
  };
  return transfer;
}
async function fillPlaces(session, jobs, more) {
  const { places, base } = more;
  const transfer = newTransfer(jobs, more.observe);
  const journal = await openJournal(`${base}.journal`, more.planId).catch((error) => {
    throw diskError(error, `cannot write ${base}.journal`);
  });
  const catchUp = (job) => job.hashing ??= (async () => {
    for (; ; ) {
      const to = job.written.find(([from2, end]) => from2 <= job.hashedTo && end > job.hashedTo)?.[1];
      if (to === void 0) return;
      const from = job.offset + job.hashedTo;
      await hashPlace(await places.open(job), from, job.offset + to, job.hash);
      job.hashedTo = to;
    }
  })().finally(() => job.hashing = void 0);
  const verify = async (job) => {
    while (job.hashedTo < job.descriptor.size) await catchUp(job);
    return `${job.descriptor.digest.split(":")[0]}:${job.hash.digest("hex")}` === job.descriptor.digest;
  };
  const finish = async (job) => {
    await places.finish(job);
    journal.record(job);
  };
  const sink = {
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
      if (position <= job.hashedTo && job.hashedTo < position + length) catchUp(job).catch(() => void 0);
    },
    segmentDone: (job) => journal.record(job),
    blobDone: async (job) => {
      if (!await verify(job)) {
        const wrong = `${job.descriptor.digest}: the bytes that came have another digest`;
        if (job.freshStarts === 0) throw new ImgpullError("DIGEST_MISMATCH", `${wrong}, from ${job.registry.origin}`);
        job.freshStarts -= 1;
        session.warn(`${wrong}; fetching the blob once more`);
        return false;
      }
      await finish(job);
      return true;
    }
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
        job.freshStarts += 1;
        void catchUp(job);
      }
      job.doneBytes = job.written.reduce((sum, [from, to]) => sum + to - from, 0);
      transfer.resumedBytes += job.doneBytes;
      if (job.written.length === 0 && await copyFromSources(job, more.sources, places)) {
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
    throw error instanceof ImgpullError || !error.syscall ? error : diskError(error, `cannot write ${base}`);
  } finally {
    await Promise.all(jobs.map((job) => job.hashing?.catch(() => void 0)));
    for (const job of jobs) if (job.unrecordedBytes > 0) journal.record(job);
    await journal.close();
  }
}
async function copyFromSources(job, sources, places) {
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
async function syncQuietly(handle) {
  await handle.sync().catch((error) => {
    if (!["ERR_ACCESS_DENIED", "EINVAL", "ENOSYS", "ENOTSUP", "EPERM"].includes(errorCodeOf(error))) throw error;
  });
}
async function syncFolder(folder) {
  const handle = await fs.open(folder, "r").catch(() => void 0);
  if (handle) await syncQuietly(handle).finally(async () => await handle.close());
}
async function checkFreeSpace(folder, neededBytes, dest) {
  const stats = await fs.statfs(folder).catch(() => void 0);
  const freeBytes = stats ? stats.bavail * stats.bsize : Number.POSITIVE_INFINITY;
  if (neededBytes > freeBytes) {
    throw new ImgpullError("DISK", `cannot write ${dest}: it needs ${formatBytes(neededBytes)} and ${folder} has ${formatBytes(freeBytes)} free`);
  }
}
function jobsOf(plan, isOwnFile) {
  return plan.entries.flatMap(({ blob, offset }) => blob ? [newJob(blob.descriptor, blob.registry, isOwnFile ? 0 : offset)] : []);
}
async function pullToTar(session, plan, dest, reuse, observe) {
  const partial = `${dest}.partial`;
  const old = `${partial}.old`;
  const unlock = await acquireLock(`${partial}.lock`, dest);
  const sources = [...reuse];
  const opened = [];
  const addSource = async (file) => {
    const source = await openTarSource(file).catch(() => void 0);
    if (!source) return;
    sources.push(source);
    opened.push(source.handle);
  };
  let worthKeeping = true;
  try {
    const journaledId = (await readOptional(`${partial}.journal`))?.split("\n")[0];
    if (journaledId !== plan.id) await fs.rename(partial, old).catch(() => void 0);
    for (const file of [old, dest]) await addSource(file);
    const handle = await fs.open(partial, fs.constants.O_RDWR | fs.constants.O_CREAT, 438);
    opened.push(handle);
    const { blocks } = await handle.stat();
    await checkFreeSpace(path.dirname(dest), plan.sizeBytes - blocks * BLOCK, dest);
    for (const { lead, bytes, offset } of plan.entries) await writeAll(handle, [lead, bytes ?? Buffer.alloc(0)], offset - lead.length);
    await writeAll(handle, [plan.trailer], plan.sizeBytes - plan.trailer.length);
    await handle.truncate(plan.sizeBytes);
    const jobs = jobsOf(plan, false);
    try {
      const places = { open: async () => handle, finish: async () => void 0 };
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
    throw error instanceof ImgpullError || !error.syscall ? error : diskError(error, `cannot write ${dest}`);
  } finally {
    await Promise.all(opened.map(async (handle) => await handle.close()));
    if (!worthKeeping) for (const file of [partial, `${partial}.journal`, old]) await fs.rm(file, { force: true });
    await unlock();
  }
}
async function replaceFile(file, bytes) {
  await fs.writeFile(`${file}.partial`, bytes, { flush: true });
  await fs.rename(`${file}.partial`, file);
}
async function pullToFolder(session, jobs, folder, nameOf, observe) {
  const base = path.join(folder, ".imgpull.partial");
  const handles = /* @__PURE__ */ new Map();
  const fileOf = (job) => path.join(folder, nameOf(job.descriptor.digest));
  const open2 = async (job) => {
    const handle = handles.get(job) ?? fs.open(`${fileOf(job)}.partial`, fs.constants.O_RDWR | fs.constants.O_CREAT, 438);
    handles.set(job, handle);
    return await handle;
  };
  const finish = async (job) => {
    const handle = await open2(job);
    await handle.truncate(job.descriptor.size);
    await syncQuietly(handle);
    await handle.close();
    handles.delete(job);
    await fs.rename(`${fileOf(job)}.partial`, fileOf(job));
  };
  const missing = [];
  for (const job of jobs) await isVerifiedFile(fileOf(job), job.descriptor) ? job.doneBytes = job.descriptor.size : missing.push(job);
  await checkFreeSpace(folder, missing.reduce((sum, job) => sum + job.descriptor.size, 0), folder);
  const unlock = await acquireLock(`${base}.lock`, folder);
  try {
    const transfer = await fillPlaces(session, missing, { base, planId: "folder", places: { open: open2, finish }, sources: [], observe });
    transfer.reusedBytes = jobs.filter((job) => !missing.includes(job)).reduce((sum, job) => sum + job.descriptor.size, 0);
    await fs.rm(`${base}.journal`, { force: true });
    return transfer;
  } finally {
    for (const handle of handles.values()) await (await handle).close();
    await unlock();
  }
}
async function isVerifiedFile(file, { digest, size }) {
  const handle = await fs.open(file, "r").catch(() => void 0);
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
async function pullToLayout(session, plan, folder, observe) {
  try {
    await fs.mkdir(path.join(folder, "blobs/sha256"), { recursive: true });
    await fs.mkdir(path.join(folder, "blobs/sha512"), { recursive: true });
    const transfer = await pullToFolder(session, jobsOf(plan, true), folder, blobPath, observe);
    for (const { name, bytes } of plan.entries) if (bytes && name.startsWith("blobs/")) await replaceFile(path.join(folder, name), bytes);
    const file = path.join(folder, "index.json");
    const before = await readOptional(file) ?? "{}";
    const old = JSON.parse(before);
    const ours = JSON.parse(String(plan.entries.find(({ name }) => name === "index.json")?.bytes));
    const nameOf = (entry) => entry.annotations?.["org.opencontainers.image.ref.name"];
    const names = new Set(ours.manifests.map(nameOf));
    const others = isRecord(old) && Array.isArray(old.manifests) ? old.manifests.filter((entry) => !names.has(nameOf(entry))) : [];
    await replaceFile(path.join(folder, "oci-layout"), json({ imageLayoutVersion: "1.0.0" }));
    await replaceFile(file, json({ ...isRecord(old) ? old : {}, ...ours, manifests: [...others, ...ours.manifests] }));
    await fs.rmdir(path.join(folder, "blobs/sha512")).catch(() => void 0);
    await syncFolder(folder);
    return transfer;
  } catch (error) {
    if (error instanceof SyntaxError) throw new ImgpullError("DISK", `${folder}: its index.json is not JSON`, { cause: error });
    throw error.syscall ? diskError(error, `cannot write ${folder}`) : error;
  }
}
async function pullToStream(session, plan, output, sources, observe) {
  const jobs = jobsOf(plan, false);
  const transfer = newTransfer(jobs, observe);
  const early = /* @__PURE__ */ new Map();
  const stop = new AbortController();
  const signal = AbortSignal.any([session.signal, stop.signal]);
  let cursor = 0;
  let waiting = [];
  const change = async () => await new Promise((resolve) => waiting.push(resolve));
  const wakeAll = () => {
    for (const resume of waiting.splice(0)) resume();
  };
  signal.addEventListener("abort", wakeAll);
  const until = async (isReady) => {
    while (!isReady()) {
      if (signal.aborted) throw new ImgpullError("ABORTED", "stopped");
      await change();
    }
  };
  const emit = async (bytes) => {
    if (bytes.length > 0 && !output.write(bytes)) await drained(output, signal);
    cursor += bytes.length;
    wakeAll();
  };
  const sink = {
    isSplitting: false,
    unitBytes: ({ registry }) => registry.acceptsRanges && registry.latencyMs >= LIMITS.farLatencyMs ? LIMITS.streamUnitBytes : Number.POSITIVE_INFINITY,
    accept: () => void 0,
    write: async (job, position, chunks) => {
      const offset = job.offset + position;
      await until(() => offset < cursor + LIMITS.streamWindowBytes);
      early.set(offset, chunks);
      wakeAll();
    },
    segmentDone: () => void 0,
    blobDone: async () => true
  };
  const emitBlob = async (job) => {
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
  const emitAll = async () => {
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
    if (!await sourceOf(job.descriptor, sources)) continue;
    Object.assign(job, { isDone: true, doneBytes: job.descriptor.size });
    transfer.reusedBytes += job.descriptor.size;
  }
  const broken = (error) => stop.abort(error);
  output.on("error", broken);
  const ends = [fetchBlobs({ ...session, signal }, transfer, sink), emitAll()].map(async (end) => {
    await end.catch((error) => {
      stop.abort(error);
      throw error;
    });
  });
  await Promise.allSettled(ends);
  output.off("error", broken);
  if (session.signal.aborted) throw new ImgpullError("ABORTED", "stopped");
  const reason = stop.signal.reason;
  if (stop.signal.aborted) throw reason.syscall ? diskError(reason, "cannot write the stream") : reason;
  return transfer;
}
async function sourceOf({ digest, size }, sources) {
  for (const { handle, blobs } of sources) {
    const entry = blobs.get(digest);
    if (entry?.sizeBytes !== size) continue;
    const hash = newHash(digest);
    await hashPlace(handle, entry.offset, entry.offset + size, hash);
    if (`${digest.split(":")[0]}:${hash.digest("hex")}` === digest) return { handle, offset: entry.offset };
  }
  return void 0;
}
async function drained(output, signal) {
  await new Promise((resolve, reject) => {
    const settle = (error) => {
      output.off("drain", settle).off("close", closed);
      signal.removeEventListener("abort", closed);
      error ? reject(error) : resolve();
    };
    const closed = () => settle(new ImgpullError("ABORTED", "the reader has gone"));
    output.once("drain", settle).once("close", closed);
    signal.addEventListener("abort", closed, { once: true });
  });
}
async function fetchConfig(session, registry, descriptor) {
  return await withRetries(session, session.signal, async () => {
    const answer = await registry.blob(descriptor, 0, descriptor.size, session.signal);
    const bytes = await readBody(answer.body, LIMITS.configBytes, `the config ${descriptor.digest}`);
    if (digestOf(bytes, descriptor.digest) === descriptor.digest && bytes.length === descriptor.size) return bytes;
    throw new ImgpullError("DIGEST_MISMATCH", `${redactUrl(answer.url)}: the config's bytes have another digest`);
  });
}
async function resolveImage(session, reference, name, isAll) {
  const where = formatReference(reference);
  const registry = new Registry(session, reference);
  const { wanted } = session.settings;
  const top = await registry.manifest(reference.digest ?? reference.tag);
  const parsed = parseManifest(top, where);
  const common = { reference, name, registry };
  const fetchChild = async (entry2) => {
    const child = await registry.manifest(entry2.digest);
    if (child.bytes.length === entry2.size) return child;
    throw new ImgpullError("SIZE_MISMATCH", `${where}: ${entry2.digest} has ${child.bytes.length} bytes, not ${entry2.size}`);
  };
  const tooDeep = () => {
    throw new ImgpullError("TOO_LARGE", `${where}: indexes inside indexes, more than ${LIMITS.indexDepth} deep`);
  };
  if (isAll) {
    const manifests = [top];
    const contents = [];
    const collect = async (fetched2, manifest2, entry2, depth) => {
      if (depth > LIMITS.indexDepth) tooDeep();
      const platform = entry2?.platform === void 0 ? {} : { platform: entry2.platform };
      if (manifest2.kind === "image") return void contents.push({ digest: fetched2.digest, manifest: manifest2, ...platform });
      const children = await mapConcurrently(manifest2.manifests, session.settings.concurrency, fetchChild);
      for (const [at, child] of children.entries()) {
        if (manifests.some(({ digest }) => digest === child.digest)) continue;
        manifests.push(child);
        await collect(child, parseManifest(child, where), manifest2.manifests[at], depth + 1);
      }
    };
    await collect(top, parsed, void 0, 0);
    const loadable = contents.filter((content2) => content2.platform?.os !== "unknown");
    return { ...common, top, manifests, contents: [.../* @__PURE__ */ new Set([...loadable, ...contents])], platform: "all" };
  }
  if (parsed.kind === "image") {
    const isConfig = IMAGE_CONFIG_TYPES.includes(parsed.config.mediaType);
    const configBytes = isConfig ? await fetchConfig(session, registry, parsed.config) : void 0;
    const platform = configBytes && platformOfConfig(configBytes);
    if (platform) checkPlatform(session, where, platform);
    const content2 = { digest: top.digest, manifest: parsed, ...platform ? { platform } : {}, ...configBytes ? { configBytes } : {} };
    return { ...common, top, manifests: [top], contents: [content2], platform: formatPlatform(platform) };
  }
  const host = wantedPlatform(wanted);
  const seen = [];
  const search = async (index, platform, depth) => {
    if (depth > LIMITS.indexDepth) tooDeep();
    const usable = index.manifests.filter((entry2) => !isAttestation(entry2));
    const isNested = (entry2) => isIndexType(entry2.mediaType);
    const [only] = usable;
    const plain = usable.filter((entry2) => !isNested(entry2));
    seen.push(...plain.flatMap((entry2) => entry2.platform ? [formatPlatform(entry2.platform)] : []));
    const found2 = matchPlatform(plain, platform) ?? (usable.length === 1 && only && !only.platform && !isNested(only) ? only : void 0);
    if (found2) return [found2, await fetchChild(found2)];
    for (const entry2 of usable.filter(isNested)) {
      const isOther = entry2.platform?.os && !matchPlatform([entry2], platform);
      const fetched2 = isOther ? void 0 : await fetchChild(entry2);
      const nested = fetched2 && parseManifest(fetched2, where);
      const inside = nested?.kind === "index" ? await search(nested, platform, depth + 1) : void 0;
      if (inside) return inside;
    }
    return void 0;
  };
  let found = await search(parsed, host, 1);
  if (!found && wanted.os === void 0 && host.os !== "linux") {
    seen.length = 0;
    found = await search(parsed, { ...host, os: "linux" }, 1);
    if (found) session.warn(`${where} has nothing for ${host.os}: taking linux`);
  }
  if (!found) {
    const choices = [...new Set(seen)].join(", ") || "none";
    throw new ImgpullError("NO_PLATFORM", `${where} has no image for ${formatPlatform(host)}
  it has: ${printable(choices, 1e3)} (--platform)`);
  }
  const [entry, fetched] = found;
  const manifest = parseManifest(fetched, where);
  if (manifest.kind !== "image") throw new ImgpullError("PROTOCOL", `${where}: the entry for ${formatPlatform(host)} is an index`);
  const content = { digest: fetched.digest, manifest, ...entry.platform ? { platform: entry.platform } : {} };
  return { ...common, top: fetched, manifests: [fetched], contents: [content], platform: formatPlatform(entry.platform) };
}
function platformOfConfig(bytes) {
  try {
    const config = JSON.parse(bytes.toString("utf8"));
    return isRecord(config) && config.os ? parsePlatform(config) : void 0;
  } catch {
    return void 0;
  }
}
function checkPlatform(session, where, platform) {
  const { wanted } = session.settings;
  const entry = { mediaType: "", digest: "", size: 0, platform };
  const asked = {
    os: wanted.os ?? platform.os,
    architecture: wanted.architecture ?? platform.architecture,
    ...wanted.variant === void 0 ? {} : { variant: wanted.variant }
  };
  const isAsked = wanted.variant === void 0 ? asked.os === platform.os && asked.architecture === platform.architecture : matchPlatform([entry], asked) !== void 0;
  if (!isAsked) {
    throw new ImgpullError("NO_PLATFORM", `${where} has no image for ${formatPlatform(asked)}
  it is one image, for ${formatPlatform(platform)}`);
  }
  const host = wantedPlatform(wanted);
  const isForeign = platform.os !== host.os && platform.os !== "linux" || platform.architecture !== host.architecture;
  if (isForeign) session.warn(`${where} is one image, for ${formatPlatform(platform)}: not for this machine`);
}
function warnOfLayers(session, images) {
  const kinds = [
    [/zstd/, "has layers compressed with zstd: Docker before 23 and podman before 4 will not load it"],
    [/foreign|nondistributable/, "has foreign layers, which Docker on Linux and some registries do not take"]
  ];
  for (const { contents, name } of images) {
    for (const [pattern, words] of kinds) {
      if (contents.some(({ manifest }) => manifest.layers.some(({ mediaType }) => pattern.test(mediaType)))) session.warn(`${name} ${words}`);
    }
  }
}
async function isDirectory(file) {
  return await fs.stat(file).then((stats) => stats.isDirectory(), () => false);
}
async function pullImages(session, request, observe) {
  const { destination } = request;
  const isLayout = typeof destination === "string" && (/[\\/]$/.test(destination) || await isDirectory(destination));
  if (typeof destination === "string" && !isLayout) {
    const folder = path.dirname(destination);
    if (!await isDirectory(folder)) throw new ImgpullError("DISK", `cannot write ${destination}: there is no directory ${folder}`);
    await fs.access(folder, fs.constants.W_OK).catch((error) => {
      throw diskError(error, `cannot write ${destination}`);
    });
  }
  const sources = [];
  try {
    for (const file of request.reuse) sources.push(await openTarSource(file));
    const base = request.since === void 0 ? void 0 : await openTarSource(request.since);
    await base?.handle.close();
    const images = await mapConcurrently(request.images, session.settings.concurrency, async ({ reference, name }) => await resolveImage(session, reference, name, request.isAll));
    const plan = planTar(images, new Set(base?.blobs.keys() ?? []));
    warnOfLayers(session, images);
    if (request.since !== void 0) {
      const bytes = plan.omitted.reduce((sum, { size }) => sum + size, 0);
      session.warn(`left out ${plan.omitted.length} layers (${formatBytes(bytes)}) that ${request.since} holds: load that first. docker's containerd store and ctr --no-unpack take this tar without it, in silence`);
    }
    const transfer = await (typeof destination !== "string" ? pullToStream(session, plan, destination, sources, observe) : isLayout ? pullToLayout(session, plan, destination, observe) : pullToTar(session, plan, await fs.realpath(destination).catch(() => destination), sources, observe));
    const results = images.map(({ name, top, platform, contents }) => ({
      name,
      digest: top.digest,
      platform,
      layers: contents.reduce((sum, { manifest }) => sum + manifest.layers.length, 0),
      sizeBytes: isLayout ? plan.blobBytes : plan.sizeBytes,
      fetchedBytes: transfer.fetchedBytes
    }));
    return { results, transfer, plan };
  } finally {
    for (const { handle } of sources) await handle.close();
  }
}
function settingsOf(opts, environment, certsDirectory = "/etc/docker/certs.d") {
  const refuse = (reason) => {
    throw new ImgpullError("BAD_OPTION", reason);
  };
  const integer = (value, fallback, name, minimum) => {
    const given2 = value ?? fallback;
    return Number.isSafeInteger(given2) && given2 >= minimum ? given2 : refuse(`${name} must be a whole number from ${minimum} on`);
  };
  const { scheme = "https", tlsCert, tlsKey, caCert, username, password, token, namespace, osType, archType, variant } = opts;
  if (scheme !== "https" && scheme !== "http") refuse(`scheme must be https or http, not "${printable(String(scheme))}"`);
  if (tlsCert === void 0 !== (tlsKey === void 0)) refuse("a client certificate and its key go together");
  if (password !== void 0 && username === void 0) refuse("a password needs a user name");
  if (token !== void 0 && username !== void 0) refuse("a token and a user name exclude each other");
  if (namespace !== void 0 && !HOST.test(namespace)) refuse(`"${printable(namespace)}" is not a registry's host name`);
  if (token !== void 0 && !/^[\x21-\x7e]+$/.test(token)) refuse("the token has characters that no header can carry");
  const given = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== void 0 && value !== ""));
  return {
    scheme,
    environment,
    certsDirectory,
    insecure: opts.insecure ?? false,
    timeoutMs: integer(opts.timeoutMs, 3e4, "the timeout", 1),
    concurrency: Math.min(64, integer(opts.concurrency, 8, "concurrency", 1)),
    retries: integer(opts.retries, 5, "retries", 0),
    wanted: given({ os: osType, architecture: archType, variant }),
    ...given({ tlsCert, tlsKey, caCert, username, password, token, namespace })
  };
}
async function withSession(opts, run, replaced = {}) {
  const environment = replaced.environment ?? process.env;
  const settings = replaced.settings ?? settingsOf(opts, environment);
  const transport = createTransport(settings);
  const signal = opts.signal ?? new AbortController().signal;
  try {
    if (signal.aborted) throw new ImgpullError("ABORTED", "stopped", { cause: signal.reason });
    return await run({
      settings,
      transport,
      environment,
      signal,
      clock: systemClock,
      challenges: /* @__PURE__ */ new Map(),
      credentials: /* @__PURE__ */ new Map(),
      warn: opts.onWarning ?? (() => void 0),
      ...replaced
    });
  } finally {
    transport.close();
  }
}
function newPullerOpts(url) {
  const { os: osType, architecture: archType } = hostPlatform();
  return { url, scheme: "https", osType, archType };
}
var Puller = class {
  #opts;
  #reference;
  constructor(urlOrOpts) {
    this.#opts = typeof urlOrOpts === "string" ? { url: urlOrOpts } : { ...urlOrOpts };
    this.#reference = parseReference(this.#opts.url);
    settingsOf(this.#opts, {});
  }
  getUrl() {
    return this.#opts.url;
  }
  getOpts() {
    return { ...this.#opts };
  }
  /** Leaves a verified tar at `dest`, or adds to the OCI image layout there where `dest` is a directory or ends in "/". */
  async pullTar(dest) {
    const { onProgress } = this.#opts;
    const name = formatReference(imageName(this.#reference, this.#opts.namespace));
    const images = [{ reference: this.#reference, name }];
    return await withSession(this.#opts, async (session) => {
      const report = progressReporter(onProgress);
      const request = { images, destination: dest, isAll: false, reuse: [] };
      const { results, transfer } = await pullImages(session, request, report);
      report(transfer, void 0, "finish");
      return results[0];
    });
  }
  /** The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no index for it. */
  async pullManifest(type) {
    if (type !== "list" && type !== "image") throw new ImgpullError("BAD_OPTION", `a manifest is "list" or "image", not "${printable(String(type))}"`);
    return await withSession(this.#opts, async (session) => {
      if (type === "image") return this.#holder((await resolveImage(session, this.#reference, "", false)).top);
      const fetched = await this.#fetch(session);
      if (parseManifest(fetched, this.#opts.url).kind === "index") return this.#holder(fetched);
      throw new ImgpullError("NOT_FOUND", `${formatReference(this.#reference)} has no list of manifests: it is one image (--manifest image)`);
    });
  }
  /** Whatever the registry has under the reference: an index or an image manifest. */
  async getManifest() {
    return await withSession(this.#opts, async (session) => {
      const fetched = await this.#fetch(session);
      parseManifest(fetched, this.#opts.url);
      return this.#holder(fetched);
    });
  }
  /** The manifest's descriptor without its bytes, where the registry tells it. `size` is in bytes. */
  async headManifest() {
    return await withSession(this.#opts, async (session) => {
      const head = await new Registry(session, this.#reference).head(this.#tagOrDigest());
      if (head && (this.#reference.digest ?? head.digest) === head.digest) return head;
      const { mediaType, digest, bytes } = await this.#fetch(session);
      return { mediaType, digest, size: bytes.length };
    });
  }
  /** Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept. */
  async pullBlobs(holder, dir) {
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
        report(await pullToFolder(session, jobs, dir, (digest) => digest.slice(digest.indexOf(":") + 1), report), void 0, "finish");
      } catch (error) {
        throw error.syscall ? diskError(error, `cannot write ${dir}`) : error;
      }
    });
  }
  #tagOrDigest() {
    return this.#reference.digest ?? this.#reference.tag;
  }
  async #fetch(session) {
    return await new Registry(session, this.#reference).manifest(this.#tagOrDigest());
  }
  #holder({ mediaType, digest, bytes }) {
    return { mediaType, digest, bytes, manifest: JSON.parse(bytes.toString("utf8")), imageUrl: this.#opts.url };
  }
};
function progressReporter(onProgress) {
  let doneBytes = 0;
  onProgress?.({ phase: "resolve", doneBytes: 0, totalBytes: 0, blobsDone: 0, blobsTotal: 0 });
  return (transfer, _finished, phase = "fetch") => {
    const { jobs, totalBytes } = transfer;
    const sum = jobs.reduce((total, job) => total + job.doneBytes, 0);
    doneBytes = phase === "finish" ? totalBytes : Math.min(totalBytes, Math.max(doneBytes, sum));
    onProgress?.({ phase, doneBytes, totalBytes, blobsDone: jobs.filter((job) => job.isDone).length, blobsTotal: jobs.length });
  };
}
async function listTar(_io, file) {
  throw new ImgpullError("UNSUPPORTED", `--list-tar ${file}: not there yet`);
}
async function verifyTar(_io, file) {
  throw new ImgpullError("UNSUPPORTED", `--verify ${file}: not there yet`);
}
var OPTION_GROUPS = [
  ["What to pull", [
    { name: "os", short: "o", value: "OS", help: "operating system wanted; default: this machine's" },
    { name: "arch", short: "a", value: "ARCH", help: "processor wanted (amd64, arm64, arm …)" },
    { name: "variant", value: "V", help: "processor variant wanted (v7, v8 …)" },
    { name: "platform", value: "OS/ARCH[/V]", help: "the three in one word; all takes every platform" },
    { name: "from", value: "FILE", help: "read more IMAGEs, one a line; - is stdin" },
    { name: "name", value: "NAME", help: "the name that the image gets in the tar" },
    { name: "reuse", value: "TAR", isRepeatable: true, help: "take blobs from a tar that exists (repeatable)" },
    { name: "since", value: "TAR", help: "leave out layers that this tar holds" }
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
    { name: "timeout", value: "SECONDS", help: "how long a connection may be silent; default 30" }
  ]],
  ["Look, do not pull", [
    { name: "manifest", short: "m", value: "list|image", help: "print the manifest" },
    { name: "list-tar", short: "l", value: "TAR", help: "say what a tar holds, offline" },
    { name: "verify", value: "TAR", help: "hash a tar again, offline" },
    { name: "parsed", help: "print the parsed command line as JSON" },
    { name: "quiet", short: "q", help: "no progress" },
    { name: "version", short: "v", help: "print the version" },
    { name: "help", short: "h", help: "print this help" }
  ]]
];
var OPTIONS = OPTION_GROUPS.flatMap(([, options]) => options);
function versionText() {
  return `imgpull version: ${"1.0.0"} build date: ${"2026-11-23T00:00:00Z"}`;
}
function helpText() {
  const row = ({ name, short, value, help }) => `  ${short ? `-${short}, ` : "    "}${`--${name}${value ? ` ${value}` : ""}`.padEnd(24)}${help}`;
  return [
    "imgpull [options] IMAGE [IMAGE...] [DEST]    pull images into one verified tar",
    "DEST: a file; - for stdout; a directory or NAME/ for an OCI layout",
    ...OPTION_GROUPS.flatMap(([title, options]) => [`${title}:`, ...options.map(row)]),
    "Examples:",
    "  imgpull alpine:3.22 alpine.tar && docker load -i alpine.tar",
    "  imgpull ghcr.io/org/app:1 --platform linux/arm64 - | ssh host podman load",
    "  imgpull --from images.txt bundle.tar > images.lock",
    ""
  ].join("\n");
}
function usage(reason) {
  return new ImgpullError("BAD_OPTION", `${reason} (imgpull --help)`);
}
function editDistance(left, right) {
  let row = Array.from({ length: right.length + 1 }, (_, at) => at);
  for (const [at, letter] of [...left].entries()) {
    row = row.reduce((next, above, column) => {
      const diagonal = (row[column - 1] ?? 0) + (right[column - 1] === letter ? 0 : 1);
      return [...next, column === 0 ? at + 1 : Math.min(above + 1, (next[column - 1] ?? 0) + 1, diagonal)];
    }, []);
  }
  return row[right.length] ?? 0;
}
function parseCommandLine(argv) {
  const options = Object.fromEntries([...OPTIONS, { name: "ca", value: "FILE" }].map(({ name, short, value }) => [name, { type: value ? "string" : "boolean", ...short ? { short } : {} }]));
  const { tokens } = parseArgs({ args: [...argv], options, strict: false, allowPositionals: true, tokens: true });
  const values = {};
  const switches = /* @__PURE__ */ new Set();
  const reuse = [];
  const positionals = [];
  for (const token of tokens) {
    if (token.kind === "positional") positionals.push(token.value);
    if (token.kind !== "option") continue;
    const name = token.name === "ca" ? "cacert" : token.name;
    const spec = OPTIONS.find((option) => option.name === name);
    if (!spec) {
      const [nearest] = OPTIONS.map((option) => ({ name: option.name, distance: editDistance(name, option.name) })).filter(({ name: other, distance }) => distance <= 2 || name.length > 2 && other.startsWith(name)).sort((left, right) => left.distance - right.distance);
      const hint = nearest ? `: did you mean --${nearest.name}?` : "";
      throw usage(`unknown option ${printable(token.rawName, 60)}${hint}`);
    }
    if (!spec.value) {
      if (token.value !== void 0) throw usage(`${token.rawName} takes no value`);
      if (switches.has(name)) throw usage(`--${name} is given twice`);
      switches.add(name);
      continue;
    }
    const isShort = !token.rawName.startsWith("--");
    const value = isShort && token.inlineValue ? token.value?.replace(/^=/, "") : token.value;
    if (value === void 0 || value === "" || !token.inlineValue && value.startsWith("-") && value !== "-") {
      throw usage(`${token.rawName} needs a value (${spec.value})`);
    }
    if (values[name] !== void 0) throw usage(`--${name} is given twice`);
    if (spec.isRepeatable) reuse.push(value);
    else values[name] = value;
  }
  return { values, switches, reuse, positionals };
}
function planCommand({ values, switches, reuse, positionals }) {
  const { platform } = values;
  if (platform !== void 0 && (values.os ?? values.arch ?? values.variant) !== void 0) {
    throw usage("--platform excludes --os, --arch and --variant");
  }
  const [osType, archType, variant, ...rest] = platform === void 0 || platform === "all" ? [values.os, values.arch, values.variant] : platform.split("/");
  const isPlatform = platform === void 0 || platform === "all" || osType && archType && variant !== "" && rest.length === 0;
  if (!isPlatform) throw usage(`--platform is OS/ARCH, OS/ARCH/VARIANT or all, not "${printable(platform)}"`);
  const choice = (name2, choices) => {
    const value = values[name2];
    if (value === void 0 || choices.includes(value)) return value;
    throw usage(`--${name2} is ${choices.join(" or ")}, not "${printable(value)}"`);
  };
  const number = (name2, minimum, maximum, isWhole = true) => {
    const value = values[name2];
    if (value === void 0) return void 0;
    const parsed = /^\d+(\.\d+)?$/.test(value) ? Number(value) : Number.NaN;
    if (parsed >= minimum && parsed <= maximum && (!isWhole || Number.isInteger(parsed))) return parsed;
    throw usage(`--${name2} is a ${isWhole ? "whole " : ""}number from ${minimum} to ${maximum}, not "${printable(value)}"`);
  };
  const { user: username, token, password, cert: tlsCert, key: tlsKey, cacert: caCert, ns: namespace, from, name, since } = values;
  const isPasswordOnStdin = switches.has("password-stdin");
  if (username !== void 0 && password === void 0 && !isPasswordOnStdin) throw usage("--user needs --password or --password-stdin");
  if (password !== void 0 && isPasswordOnStdin) throw usage("--password and --password-stdin exclude each other");
  if ((password !== void 0 || isPasswordOnStdin) && username === void 0) throw usage("--password needs --user");
  if (token !== void 0 && username !== void 0) throw usage("--token and --user exclude each other");
  if (isPasswordOnStdin && from === "-") throw usage("stdin is asked for twice: --password-stdin and --from -");
  if (tlsCert === void 0 !== (tlsKey === void 0)) throw usage("--cert and --key go together");
  const timeout = number("timeout", 1e-3, 86400, false);
  const opts = {
    scheme: choice("scheme", ["https", "http"]),
    osType,
    archType,
    variant,
    username,
    password,
    token,
    tlsCert,
    tlsKey,
    caCert,
    insecure: switches.has("insecure") || void 0,
    namespace,
    concurrency: number("concurrency", 1, 64),
    retries: number("retries", 0, 100),
    timeoutMs: timeout === void 0 ? void 0 : Math.ceil(timeout * 1e3)
  };
  for (const key of Object.keys(opts)) if (opts[key] === void 0) delete opts[key];
  const manifest = choice("manifest", ["list", "image"]);
  const isLooking = values["list-tar"] !== void 0 || values.verify !== void 0;
  const hasDestination = manifest === void 0 && (from !== void 0 ? positionals.length > 0 : positionals.length > 1);
  const destination = hasDestination ? positionals.at(-1) : void 0;
  const images = manifest !== void 0 ? positionals.slice(0, 1) : hasDestination ? positionals.slice(0, -1) : [...positionals];
  if (!isLooking && images.length === 0 && from === void 0) throw usage("IMAGE is missing");
  if (!isLooking && from !== void 0 && destination === void 0) throw usage("DEST is missing");
  if (isLooking && positionals.length > 0) throw usage("--list-tar and --verify take no IMAGE");
  if (name !== void 0 && (images.length !== 1 || from !== void 0)) throw usage("--name goes with one IMAGE");
  return {
    opts,
    images,
    destination,
    manifest,
    from,
    name,
    since,
    reuse,
    isAll: platform === "all",
    isPasswordOnStdin,
    isQuiet: switches.has("quiet"),
    given: new Set(Object.keys(values))
  };
}
function checkDestinationName(destination) {
  if (/[\\/]|\.(tar|oci|img|tgz|zip|gz)$/i.test(destination) || !/[:@]/.test(destination)) return;
  try {
    parseReference(destination);
  } catch {
    return;
  }
  throw usage(`DEST is missing: "${destination}" reads as an IMAGE; say ./${destination} to mean a file`);
}
async function readStdin(io) {
  const chunks = [];
  for await (const chunk of io.stdin) chunks.push(Buffer.from(chunk));
  return Buffer.concat(chunks).toString("utf8");
}
function showProgress(io, isQuiet) {
  const { stderr } = io;
  const isLive = stderr.isTTY === true && !isQuiet && io.environment.TERM !== "dumb";
  const dim = (text) => io.environment.NO_COLOR || !isLive ? text : `\x1B[2m${text}\x1B[22m`;
  let drawnLines = 0;
  let latest;
  const startedAtMs = performance.now();
  const clear = () => {
    if (drawnLines > 0) stderr.write(`\x1B[${drawnLines}A\r\x1B[J`);
    drawnLines = 0;
  };
  const total = ({ jobs, totalBytes, fetchedBytes }) => {
    const doneBytes = jobs.reduce((sum, job) => sum + job.doneBytes, 0);
    const rate = fetchedBytes / Math.max(1e-3, (performance.now() - startedAtMs) / 1e3);
    const left = rate > 0 ? `, ${Math.ceil((totalBytes - doneBytes) / rate)} s left` : "";
    return `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${formatBytes(rate)}/s${left}`;
  };
  const draw = () => {
    if (!latest) return;
    if (!isLive) return void stderr.write(`imgpull: ${total(latest)}
`);
    const width = Math.max(20, (stderr.columns ?? 80) - 1);
    const moving = [...new Set([...latest.active].map(({ job }) => job))].slice(0, 12);
    const line = ({ descriptor: { digest, size }, doneBytes }) => {
      const label = `${digest.split(":")[1]?.slice(0, 12)} ${formatBytes(doneBytes)}/${formatBytes(size)} `;
      const room = Math.min(30, width - label.length - 2);
      const filled = Math.round(room * doneBytes / Math.max(1, size));
      return room < 5 ? label : `${label}[${"#".repeat(filled)}${" ".repeat(room - filled)}]`;
    };
    clear();
    const lines = [...moving.map((job) => dim(line(job).slice(0, width))), total(latest).slice(0, width)];
    stderr.write(lines.map((each) => `${each}
`).join(""));
    drawnLines = lines.length;
  };
  const timer = isQuiet ? void 0 : setInterval(draw, isLive ? 100 : 1e4);
  timer?.unref();
  return {
    observe: (transfer, finished) => {
      latest = transfer;
      if (!finished || isQuiet || isLive) return;
      const { digest, size } = finished.descriptor;
      stderr.write(`imgpull: ${digest.slice(0, 19)} ${formatBytes(size)} done
`);
    },
    say: (text) => {
      clear();
      stderr.write(`imgpull: ${text}
`);
    },
    stop: () => {
      clearInterval(timer);
      clear();
      latest = void 0;
    },
    seconds: () => ((performance.now() - startedAtMs) / 1e3).toFixed(1)
  };
}
async function listImages(io, command) {
  const texts = [...command.images];
  if (command.from !== void 0) {
    const list = command.from === "-" ? await readStdin(io) : await fs.readFile(command.from, "utf8").catch((error) => {
      throw new ImgpullError("BAD_OPTION", `cannot read --from ${command.from}: ${DISK_WORDS[errorCodeOf(error)] ?? "unreadable"}`);
    });
    texts.push(...list.split(/\r?\n/).map((line) => line.replace(/(^|\s)#.*$/, "").trim()).filter(Boolean));
  }
  if (texts.length === 0) throw usage("no IMAGE is given");
  const problems = [];
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
    const named = command.name === void 0 ? imageName(reference, command.opts.namespace) : parseReference(command.name);
    return { reference, name: formatReference(named) };
  });
  const names = images.map(({ name }) => name);
  const doubled = names.find((name, at) => names.indexOf(name) !== at);
  if (doubled !== void 0) throw usage(`two IMAGEs would have the name ${doubled} in the tar`);
  const hosts = new Set(references.map(({ host }) => host));
  const bound = OPTIONS.find(({ name, isForOneHost }) => isForOneHost && command.given.has(name));
  if (hosts.size > 1 && bound) throw usage(`--${bound.name} belongs to one registry, and the IMAGEs are on ${[...hosts].join(", ")}`);
  return images;
}
async function printManifest(io, opts, type) {
  const { bytes, digest, manifest } = await new Puller(opts).pullManifest(type);
  io.stdout.write(io.stdout.isTTY ? `${JSON.stringify(manifest, null, 2)}
` : bytes);
  io.stderr.write(`${digest}
`);
}
async function runCommand(argv, io, signal) {
  const line = parseCommandLine(argv);
  if (line.switches.has("help")) return void io.stdout.write(helpText());
  if (line.switches.has("version")) return void io.stdout.write(`${versionText()}
`);
  const command = planCommand(line);
  if (line.switches.has("parsed")) {
    const hide = (values) => Object.fromEntries(Object.entries(values).map(([key, value]) => [key, OPTIONS.some(({ name, isSecret }) => isSecret && name === key) ? "***" : value]));
    const { opts: opts2, given: _given, ...rest } = command;
    return void io.stdout.write(`${JSON.stringify({ ...rest, ...hide(opts2) }, null, 2)}
`);
  }
  if (line.values["list-tar"] !== void 0) return await listTar(io, line.values["list-tar"]);
  if (line.values.verify !== void 0) return await verifyTar(io, line.values.verify);
  const images = await listImages(io, command);
  const [first] = images;
  const destination = command.destination ?? defaultDestination(first.reference);
  if (command.destination !== void 0) checkDestinationName(destination);
  const password = command.isPasswordOnStdin ? { password: (await readStdin(io)).replace(/\r?\n$/, "") } : {};
  const progress = showProgress(io, command.isQuiet);
  const opts = { ...command.opts, ...password, url: formatReference(first.reference), signal, onWarning: progress.say };
  if (command.manifest !== void 0) {
    progress.stop();
    return await printManifest(io, opts, command.manifest);
  }
  const isStream = destination === "-";
  if (isStream && io.stdout.isTTY) throw usage("the tar is not written to a terminal: redirect stdout");
  try {
    await withSession(opts, async (session) => {
      const { isAll, reuse, since } = command;
      const request = { images, destination: isStream ? io.stdout : destination, isAll, reuse, ...since === void 0 ? {} : { since } };
      const { results, transfer, plan } = await pullImages(session, request, progress.observe);
      progress.stop();
      const pinned = images.map(({ reference }, at) => formatReference({ ...reference, digest: results[at]?.digest }));
      if (!isStream) io.stdout.write(pinned.map((each) => `${each}
`).join(""));
      if (command.isQuiet) return;
      const { reusedBytes, resumedBytes, fetchedBytes } = transfer;
      const parts = [
        `${formatBytes(fetchedBytes)} fetched`,
        reusedBytes > 0 ? `${formatBytes(reusedBytes)} reused` : "",
        resumedBytes > 0 ? `${formatBytes(resumedBytes)} resumed` : ""
      ].filter(Boolean);
      const count = images.length === 1 ? "1 image" : `${images.length} images`;
      progress.say(`${count}, ${formatBytes(plan.sizeBytes)} in ${isStream ? "the stream" : destination}: ${parts.join(", ")}, ${progress.seconds()} s`);
    }, { environment: io.environment });
  } finally {
    progress.stop();
  }
}
async function main(argv, given) {
  const { stdin, stdout, stderr, env: environment } = process;
  const io = given ?? { stdin, stdout, stderr, environment };
  const stop = new AbortController();
  let signalCode = 0;
  const interrupt = (name) => {
    if (signalCode !== 0) process.exit(signalCode);
    signalCode = name === "SIGINT" ? 130 : 143;
    stop.abort();
  };
  const signals = given ? [] : ["SIGINT", "SIGTERM"];
  for (const name of signals) process.on(name, interrupt);
  try {
    await runCommand(argv, io, stop.signal);
    return 0;
  } catch (error) {
    if (signalCode !== 0) return signalCode;
    if (!(error instanceof ImgpullError)) throw error;
    if (errorCodeOf(error.cause) !== "EPIPE") io.stderr.write(`imgpull: ${error.message}
`);
    return error.code === "BAD_REFERENCE" || error.code === "BAD_OPTION" ? 2 : 1;
  } finally {
    for (const name of signals) process.off(name, interrupt);
  }
}
var internals = Object.freeze({
  LIMITS,
  parseReference,
  formatReference,
  imageName,
  defaultDestination,
  apiHost,
  isExemptFromProxy,
  proxyFor,
  redactUrl,
  printable,
  systemCertificates,
  parseRetryAfter,
  retryDelayMs,
  isRetriable,
  parseChallenges,
  normalizeAuthKey,
  matchPlatform,
  wantedPlatform,
  hostPlatform,
  acceptableVariants,
  parseManifest,
  encodeTarHeader,
  planTar,
  readTar,
  digestInName,
  addRange,
  missingRanges,
  settingsOf,
  withSession,
  pullImages,
  resolveImage,
  findCredential,
  parseCommandLine,
  planCommand,
  helpText,
  editDistance,
  formatBytes,
  OPTIONS
});
export {
  ImgpullError,
  Puller,
  internals,
  main,
  newPullerOpts
};
