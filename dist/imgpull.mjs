// imgpull.ts
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
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
var DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json";
var DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json";
var DOCKER_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1";
var OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json";
var OCI_INDEX = "application/vnd.oci.image.index.v1+json";
var INDEX_TYPES = [OCI_INDEX, DOCKER_INDEX];
var MANIFEST_TYPES = [...INDEX_TYPES, OCI_MANIFEST, DOCKER_MANIFEST];
var CONFIG_TYPES = ["application/vnd.docker.container.image.v1+json", "application/vnd.oci.image.config.v1+json"];
var MIB = 1024 * 1024;
var NEVER = Number.POSITIVE_INFINITY;
var LIMITS = Object.freeze({
  manifestBytes: 4 * MIB,
  // the distribution specification's own floor for registries
  configBytes: 16 * MIB,
  tokenBytes: MIB,
  errorBodyBytes: MIB / 16,
  credentialFileBytes: 4 * MIB,
  tarMetadataBytes: 16 * MIB,
  // index.json and the like of a tar that someone else made
  indexDepth: 4,
  indexEntries: 1024,
  // with `--platform all` each entry is a request
  redirects: 10,
  tokenFloorMs: 6e4,
  // the token specification's default, and more than a skewed clock takes away
  firstBackoffMs: 1e3,
  backoffMs: 3e4,
  retryAfterMs: 12e4,
  // longer waits are the user's to decide
  batchBytes: MIB,
  // one write to disk: fewer trips to Node's thread pool than one for each chunk
  journalBytes: MIB,
  // how much a kill -9 may cost each blob, beside what a connection has gathered
  splitBytes: MIB,
  // neither half of a range that is cut in two is smaller,
  nearSplitBytes: 16 * MIB,
  // nor on a near line, where a server has megabytes under way that a cut throws away
  fastLineBytesPerSecond: 256 * MIB,
  // from here on the processor is the limit, and more connections only cost
  farLatencyMs: 10,
  // from here on a line is worth several connections before its speed is known
  streamUnitBytes: 4 * MIB,
  // DEST `-`: one request's share of a large blob
  streamWindowBytes: 32 * MIB,
  // DEST `-`: how far the line may be ahead of the reader
  lockBeatMs: 1e4
  // a lock of another machine that is six beats old belongs to nobody
});
var ImgpullError = class extends Error {
  name = "ImgpullError";
  code;
  status;
  /** @internal how long the server asks us to stay away */
  retryAfterMs;
  constructor(code, message, details = {}) {
    super(message, details.cause === void 0 ? void 0 : { cause: details.cause });
    this.code = code;
    const { status, retryAfterMs } = details;
    if (status !== void 0) this.status = status;
    if (retryAfterMs !== void 0) this.retryAfterMs = retryAfterMs;
  }
};
function fail(code, message, details) {
  throw new ImgpullError(code, message, details);
}
var errorCodeOf = (error) => String(error?.code ?? "");
function printable(text, maximum = 300) {
  const controls = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g;
  const clean = text.replace(controls, " ").trim();
  return clean.length > maximum ? `${clean.slice(0, maximum)}…` : clean;
}
function redactUrl(url) {
  const { protocol, host, pathname, searchParams } = new URL(url);
  const namespace = searchParams.get("ns");
  return printable(`${protocol}//${host}${pathname}${namespace === null ? "" : `?ns=${namespace}`}`);
}
function connectionError(error, doing) {
  if (error instanceof ImgpullError) return error;
  const cause = error;
  const code = errorCodeOf(error);
  const said = printable(cause.message || cause.errors?.[0]?.message || code);
  const make = (kind, words) => new ImgpullError(kind, `${doing}: ${words}`, { cause });
  if (cause.name === "AbortError") return new ImgpullError("ABORTED", "stopped", { cause });
  if (/wrong version number|packet length too long|unknown protocol|record layer failure/i.test(said)) {
    return make("TLS", "the server answers plain HTTP on this port\n  try --scheme http");
  }
  if (/^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO)/.test(code)) {
    return make("TLS", `${said}
  its certificate authority is not known here: --cacert FILE gives it, --insecure goes without`);
  }
  if (/^(CERT_|INVALID_|ERR_TLS|ERR_SSL|EPROTO)/.test(code)) {
    const wantsClient = /certificate required|bad certificate|handshake failure/i.test(said);
    return make("TLS", wantsClient ? `${said}
  it may want a client certificate: --cert FILE --key FILE` : said);
  }
  return make("NETWORK", code === "ENOTFOUND" ? "no such host" : code === "ECONNRESET" ? "connection lost" : said);
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
var diskWords = (error) => DISK_WORDS[errorCodeOf(error)] ?? printable(error.message);
function onDisk(doing, work) {
  return work.catch((error) => {
    const isSystem = error.syscall !== void 0 || errorCodeOf(error) === "ERR_ACCESS_DENIED";
    throw isSystem ? new ImgpullError("DISK", `${doing}: ${diskWords(error)}`, { cause: error }) : error;
  });
}
function joinErrors(failures) {
  const known = failures.filter((failure) => failure instanceof ImgpullError);
  if (known.length < failures.length) return failures.find((failure) => !(failure instanceof ImgpullError));
  const told = known.filter(({ code }) => code !== "ABORTED");
  const [first = known[0]] = told;
  const messages = [...new Set(told.map(({ message }) => message))];
  return messages.length < 2 ? first : new ImgpullError(first.code, messages.join("\n"), { status: first.status, cause: first });
}
var isDigest = (text) => typeof text === "string" && /^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/.test(text);
var hexOf = (digest) => digest.slice(digest.indexOf(":") + 1);
var newHash = (digest) => createHash(digest.slice(0, digest.indexOf(":")));
var digestOf = (bytes, like = "sha256:") => `${like.slice(0, like.indexOf(":"))}:${newHash(like).update(bytes).digest("hex")}`;
var isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
var encodeJson = (value) => Buffer.from(JSON.stringify(value), "utf8");
function parseJson(text) {
  try {
    return JSON.parse(String(text));
  } catch {
    return void 0;
  }
}
var given = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== void 0 && value !== ""));
function sumOf(items, value) {
  let sum = 0;
  for (const item of items) sum += value(item);
  return sum;
}
function formatBytes(bytes) {
  let [value, unit] = [bytes, 0];
  for (; value >= 999.5 && unit < 4; unit += 1) value /= 1e3;
  return `${unit === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}
var formatPlatform = ({ os: system, architecture, variant } = {}) => [system, architecture, variant].filter(Boolean).join("/");
async function mapConcurrently(items, limit, run) {
  const results = [];
  let next = 0;
  const lane = async () => {
    while (next < items.length) {
      const index = next++;
      [results[index]] = await Promise.allSettled([run(items[index])]);
    }
  };
  await Promise.all(Array.from({ length: limit }, lane));
  return settled(results);
}
function settled(results) {
  const failures = results.flatMap((result) => result.status === "rejected" ? [result.reason] : []);
  if (failures.length > 0) throw joinErrors(failures);
  return results.map((result) => result.value);
}
var HUB_HOSTS = ["docker.io", "index.docker.io", "registry-1.docker.io"];
var LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?";
var HOST = new RegExp(`^(?:${LABEL}(?:\\.${LABEL})*|\\[(?<ipv6>[0-9a-fA-F:.]+)\\])(?::(?<port>\\d{1,5}))?$`);
var PATH_PART = "[a-z0-9]+(?:(?:\\.|_{1,2}|-+)[a-z0-9]+)*";
var REPOSITORY = new RegExp(`^${PATH_PART}(?:/${PATH_PART})*$`);
var TAG = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/;
function isHost(text) {
  const { ipv6, port = "443" } = HOST.exec(text)?.groups ?? {};
  return HOST.test(text) && Number(port) >= 1 && Number(port) <= 65535 && (ipv6 === void 0 || net.isIPv6(ipv6));
}
function parseReference(text) {
  const refuse = (reason) => fail("BAD_REFERENCE", `bad image reference "${printable(text)}": ${reason}`);
  if (text === "") refuse("it is empty");
  if (/^[a-z]+:\/\//i.test(text)) refuse("write it without the scheme (use --scheme for http)");
  if (/[^\x21-\x7e]/.test(text)) refuse("it has a character that is not printable ASCII");
  const [named = "", digest, ...tooMany] = text.split("@");
  if (tooMany.length > 0) refuse("it has more than one @");
  if (digest !== void 0 && !isDigest(digest)) {
    refuse(`"${printable(digest)}" is not a digest: sha256: and 64, or sha512: and 128 lower-case hex digits`);
  }
  const [first = "", ...rest] = named.split("/");
  const hasHost = rest.length > 0 && (/[.:]/.test(first) || first === "localhost");
  const [host, path2] = hasHost ? [first, rest.join("/")] : ["docker.io", named];
  const colon = path2.lastIndexOf(":");
  const [name, tag] = colon < 0 ? [path2] : [path2.slice(0, colon), path2.slice(colon + 1)];
  if (!isHost(host)) refuse(`"${host}" is not a host, host:port or [IPv6 address]`);
  if (name === "") refuse("the repository is missing");
  if (name !== name.toLowerCase()) refuse("a repository is written in lower case");
  if (!REPOSITORY.test(name)) refuse(`"${name}" is not a repository name`);
  if (tag !== void 0 && !TAG.test(tag)) refuse(`"${tag}" is not a tag`);
  const isHub = HUB_HOSTS.includes(host.toLowerCase());
  const repository = isHub && !name.includes("/") ? `library/${name}` : name;
  if (host.length + repository.length + 1 > 255) refuse("host and repository are longer than 255 characters");
  const version = given({ tag: tag ?? (digest === void 0 ? "latest" : void 0), digest });
  return { host: isHub ? "docker.io" : host, repository, ...version };
}
var formatReference = ({ host, repository, tag, digest }) => `${host}/${repository}${tag === void 0 ? "" : `:${tag}`}${digest === void 0 ? "" : `@${digest}`}`;
var apiHost = (host) => host === "docker.io" ? "registry-1.docker.io" : host;
function imageName({ host, repository, tag, digest }, namespace) {
  const isMirrored = /^[^/]*\.[^/]*\//.test(repository);
  const bare = namespace !== void 0 ? `${namespace}/${repository}` : isMirrored ? repository : `${host}/${repository}`;
  return parseReference(`${bare}${tag === void 0 ? `@${digest}` : `:${tag}`}`);
}
var defaultDestination = ({ repository, tag, digest = "" }) => `${repository.slice(repository.lastIndexOf("/") + 1)}-${tag ?? hexOf(digest).slice(0, 12)}.tar`;
var readOptional = (file) => fs.readFile(file, "utf8").catch(() => void 0);
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
  const { SSL_CERT_FILE: file, SSL_CERT_DIR: directories, NODE_EXTRA_CA_CERTS: extra } = environment;
  let bundle = "";
  const add = (text) => {
    if (text?.includes("-----BEGIN CERTIFICATE-----") && !bundle.includes(text.trim())) bundle += `${text}
`;
  };
  for (const each of file ? [file] : CA_BUNDLES) if (bundle === "") add(await readOptional(each));
  for (const directory of directories?.split(path.delimiter) ?? (bundle === "" ? CA_DIRECTORIES : [])) {
    const names = await fs.readdir(directory).catch(() => []);
    for (const text of await Promise.all(names.map((name) => readOptional(path.join(directory, name))))) add(text);
  }
  const { getCACertificates } = tls;
  if (bundle === "" && ["darwin", "win32"].includes(process.platform)) getCACertificates?.("system").forEach(add);
  if (bundle === "") tls.rootCertificates.forEach(add);
  if (extra) add(await readOptional(extra));
  return [bundle];
}
async function readPem(file, option) {
  const text = await fs.readFile(file, "utf8").catch((error) => fail("TLS", `cannot read ${option} ${file}: ${diskWords(error)}`));
  return text.includes("-----BEGIN ") ? text : fail("TLS", `${option} ${file} is not a PEM file`);
}
function secureContexts({ tlsCert, tlsKey, caCert, certsDirectory, environment }) {
  const contexts = /* @__PURE__ */ new Map();
  const make = async (url, isRegistry) => {
    const ca = await systemCertificates(environment);
    if (caCert !== void 0) ca.push(await readPem(caCert, "--cacert"));
    const folder = path.join(certsDirectory, url.host);
    const names = isRegistry ? (await fs.readdir(folder).catch(() => [])).sort() : [];
    const read = (suffix) => Promise.all(
      names.filter((name) => name.endsWith(suffix)).map((name) => readPem(path.join(folder, name), "certificate"))
    );
    ca.push(...await read(".crt"));
    const isGiven = isRegistry && tlsCert !== void 0 && tlsKey !== void 0;
    const cert = isGiven ? [await readPem(tlsCert, "--cert")] : await read(".cert");
    const key = isGiven ? [await readPem(tlsKey, "--key")] : await read(".key");
    try {
      return tls.createSecureContext({ ca, cert, key });
    } catch (error) {
      return fail("TLS", `cannot use the certificates given: ${printable(error.message)}`, { cause: error });
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
  const familyOf = (address) => net.isIPv6(address) ? "ipv6" : "ipv4";
  const isAddress = net.isIP(host) !== 0;
  const isInside = (block, bits) => {
    const list = new net.BlockList();
    list.addSubnet(block, bits, familyOf(block));
    return isAddress && list.check(host, familyOf(host));
  };
  if (/(^|\.)localhost$/.test(host) || isInside("127.0.0.0", 8) || isInside("::1", 128)) return true;
  return noProxy.toLowerCase().split(/[\s,]+/).filter(Boolean).some((entry) => {
    const [block = "", bits] = entry.split("/");
    const width = net.isIPv6(block) ? 128 : 32;
    if (bits !== void 0 && net.isIP(block)) return /^\d+$/.test(bits) && Number(bits) <= width && isInside(block, +bits);
    const [, bracketed, bare, wantedPort] = /^(?:\[([^\]]*)\]|([^:]*)|)(?::(\d+))?$/.exec(entry) ?? ["", entry];
    if (wantedPort !== void 0 && wantedPort !== port) return false;
    const name = (bracketed ?? bare ?? "").replace(/^\*?\./, "");
    return name === "*" || name !== "" && (host === name || !isAddress && host.endsWith(`.${name}`));
  });
}
function proxyFor(url, environment) {
  const variable = (name2) => environment[name2] || environment[name2.toLowerCase()] || "";
  const names = [url.protocol === "https:" ? "HTTPS_PROXY" : "HTTP_PROXY", "ALL_PROXY"];
  const name = names.find((each) => variable(each) !== "");
  if (name === void 0 || isExemptFromProxy(url, variable("NO_PROXY"))) return void 0;
  const text = /^[a-z][a-z0-9+.-]*:\/\//i.test(variable(name)) ? variable(name) : `http://${variable(name)}`;
  if (!URL.canParse(text)) fail("PROXY", `${name} is not a URL`);
  const proxy = new URL(text);
  if (proxy.protocol === "http:" || proxy.protocol === "https:") return proxy;
  return fail("PROXY", `${name}: a ${proxy.protocol}// proxy is not supported, only http:// and https:// ones are`);
}
var basicAuthorization = (username, secret) => `Basic ${Buffer.from(`${username}:${secret}`, "utf8").toString("base64")}`;
function proxyHeaders({ username, password }) {
  const value = basicAuthorization(decodeURIComponent(username), decodeURIComponent(password));
  return username === "" ? {} : { "Proxy-Authorization": value };
}
var PROXY_REMEDY = "\n  the proxy wants credentials: http://USER:PASSWORD@HOST:PORT";
function tunnelAgent(proxy, agent, proxyTls, timeout) {
  const name = `the proxy ${proxy.protocol}//${proxy.host}`;
  const createConnection = (target, callback) => {
    const authority = `${net.isIPv6(String(target.host)) ? `[${target.host}]` : target.host}:${target.port}`;
    const headers = { Host: authority, ...proxyHeaders(proxy) };
    const options = { ...proxyTls, method: "CONNECT", path: authority, agent: false, timeout, headers };
    const connect2 = (proxy.protocol === "https:" ? https : http).request(proxy.origin, options);
    connect2.once("connect", ({ statusCode: status, statusMessage = "" }, socket) => {
      if (status === 200) return callback(null, tls.connect({ ...target, socket }));
      socket.destroy();
      const remedy = status === 407 ? PROXY_REMEDY : "";
      const words = `${name} refused CONNECT ${authority}: ${status} ${printable(statusMessage)}${remedy}`;
      callback(new ImgpullError("PROXY", words, { status }));
    });
    connect2.once("timeout", () => connect2.destroy(new ImgpullError("TIMEOUT", `${name} is silent`)));
    connect2.once("error", (error) => callback(connectionError(error, name)));
    connect2.end();
  };
  return Object.assign(agent, { createConnection });
}
function createTransport(settings) {
  const contextFor = secureContexts(settings);
  const agents = /* @__PURE__ */ new Map();
  const { timeoutMs, environment, insecure } = settings;
  const makeAgent = async (url, isRegistry, proxy) => {
    const keepAlive = { keepAlive: true, scheduling: "lifo" };
    const isTlsProxy = proxy?.protocol === "https:";
    const servername = isTlsProxy && net.isIP(proxy.hostname) === 0 ? proxy.hostname : "";
    const proxyTls = isTlsProxy ? { secureContext: await contextFor(proxy, false), servername } : {};
    if (url.protocol === "http:" && !isTlsProxy) return new http.Agent(keepAlive);
    if (url.protocol === "http:") return new https.Agent({ ...keepAlive, ...proxyTls });
    const secureContext = await contextFor(url, isRegistry);
    const agent = new https.Agent({ ...keepAlive, secureContext, rejectUnauthorized: insecure !== true });
    return proxy ? tunnelAgent(proxy, agent, proxyTls, timeoutMs) : agent;
  };
  const sendOnce = async (request, url, headers) => {
    const { method, signal, body } = request;
    const doing = `${method} ${redactUrl(url)}`;
    const isRegistry = request.isRegistry(url.origin);
    const proxy = proxyFor(url, environment);
    const key = `${url.protocol} ${isRegistry ? url.host : ""} ${proxy?.href ?? ""}`;
    const agent = agents.get(key) ?? makeAgent(url, isRegistry, proxy);
    agents.set(key, agent);
    const forwarder = url.protocol === "http:" ? proxy : void 0;
    const absolute = forwarder && { path: url.href, headers: { ...headers, Host: url.host, ...proxyHeaders(forwarder) } };
    const options = { method, signal, agent: await agent, timeout: timeoutMs, headers, ...absolute };
    const peer = forwarder ? new URL(forwarder.origin) : url;
    return new Promise((resolve, reject) => {
      const outgoing = (peer.protocol === "https:" ? https : http).request(peer, options);
      let incoming;
      outgoing.once("response", (response) => resolve(incoming = response));
      outgoing.once("error", (error) => {
        const isStale = outgoing.reusedSocket && errorCodeOf(error) === "ECONNRESET" && !incoming;
        if (isStale) resolve(sendOnce(request, url, headers));
        else reject(connectionError(error, doing));
      });
      outgoing.on("timeout", () => {
        if (incoming && incoming.readableLength > 0) return void outgoing.setTimeout(timeoutMs);
        (incoming ?? outgoing).destroy(new ImgpullError("TIMEOUT", `${doing}: nothing came for ${timeoutMs / 1e3} s`));
      });
      outgoing.end(body);
    });
  };
  return {
    send: (request) => followRedirects(request, sendOnce),
    close: () => agents.forEach((agent) => void agent.then((ready) => ready.destroy(), () => void 0))
  };
}
async function followRedirects(request, sendOnce) {
  let { url } = request;
  for (let hop = 0; ; hop += 1) {
    const authorization = await request.authorizationFor(url.origin);
    const common = { "User-Agent": `imgpull/${"1.0.0"}`, "Accept-Encoding": "identity" };
    const allHeaders = { ...common, ...request.headers, ...given({ Authorization: authorization }) };
    const response = await sendOnce(request, url, allHeaders);
    const { statusCode: status = 0, headers, headers: { location } } = response;
    const answer = { status, headers, url, authorization, words: "" };
    if (status >= 200 && status < 300) return { ...answer, body: response };
    if (![301, 302, 303, 307, 308].includes(status) || location === void 0 || request.body !== void 0) {
      return { ...answer, words: await readWords(response) };
    }
    response.on("error", () => void 0).resume();
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
function decodeBody(response, expectedBytes) {
  const { "content-encoding": encoding = "", "content-length": length } = response.headers;
  const isRaw = expectedBytes !== void 0 && Number(length) === expectedBytes;
  if (!/^(x-)?gzip$/i.test(encoding) || isRaw) return response;
  const decoded = zlib.createGunzip();
  response.once("error", (error) => decoded.destroy(error));
  return response.pipe(decoded.once("close", () => response.destroy()));
}
async function readBody(response, maximumBytes, what) {
  const tooLarge = `${what} is larger than ${maximumBytes} bytes`;
  const checkSize = (bytes) => bytes <= maximumBytes || fail("TOO_LARGE", tooLarge);
  const chunks = [];
  let length = 0;
  try {
    checkSize(Number(response.headers["content-length"] ?? 0));
    for await (const chunk of decodeBody(response)) {
      chunks.push(chunk);
      checkSize(length += chunk.length);
    }
  } catch (error) {
    response.destroy();
    throw connectionError(error, what);
  }
  return Buffer.concat(chunks);
}
async function readWords(response) {
  const body = await readBody(response, LIMITS.errorBodyBytes, "the error's body").catch((error) => {
    if (error.code === "ABORTED") throw error;
    return "";
  });
  const json = parseJson(body);
  if (!isRecord(json)) return /^\s*</.test(String(body)) ? "" : printable(String(body));
  const [first] = Array.isArray(json.errors) ? json.errors : [];
  const { code, message } = isRecord(first) ? first : {};
  const words = [code, message, json.details, json.message, json.error_description, json.error];
  return printable(words.filter((word) => typeof word === "string" && word !== "").slice(0, 2).join(": "));
}
var sleep = (milliseconds, signal) => delay(milliseconds, void 0, { signal });
var systemClock = { now: Date.now, random: Math.random, sleep };
function parseRetryAfter(value, now) {
  if (/^\s*\d+\s*$/.test(value ?? "")) return Number(value) * 1e3;
  const date = Date.parse(value ?? "");
  return Number.isNaN(date) ? void 0 : Math.max(0, date - now);
}
var isMismatch = ({ code }) => code === "DIGEST_MISMATCH" || code === "SIZE_MISMATCH";
function isRetriable(error) {
  if (!(error instanceof ImgpullError)) return false;
  const { code, status = 0, retryAfterMs } = error;
  if (code === "NETWORK") return errorCodeOf(error.cause) !== "ENOTFOUND";
  if (code === "TIMEOUT" || code === "RATE_LIMITED" || retryAfterMs !== void 0 || isMismatch(error)) return true;
  const isServers = status === 408 || status === 425 || status >= 500 && status !== 501 && status !== 505;
  return (code === "PROTOCOL" || code === "PROXY") && isServers;
}
function retryDelayMs(error, failures, retries, random) {
  if (!isRetriable(error) || failures > (isMismatch(error) ? Math.min(1, retries) : retries)) return void 0;
  const { retryAfterMs = 0 } = error;
  const ceiling = Math.min(LIMITS.backoffMs, LIMITS.firstBackoffMs * 2 ** (failures - 1));
  return retryAfterMs > LIMITS.retryAfterMs ? void 0 : Math.max(retryAfterMs, Math.round(ceiling * (0.5 + random / 2)));
}
async function withRetries(session, attempt, gotOn = () => false) {
  const { clock, settings: { retries }, signal } = session;
  for (let failures = 1; ; failures += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (signal.aborted) fail("ABORTED", "stopped", { cause: error });
      if (gotOn()) failures = 1;
      const waitMs = retryDelayMs(error, failures, retries, clock.random());
      if (waitMs === void 0) throw error;
      const [said] = error.message.split("\n");
      session.warn(`${said}; trying again in ${(waitMs / 1e3).toFixed(1)} s (${failures} of ${retries})`);
      await clock.sleep(waitMs, signal).catch((cause) => fail("ABORTED", "stopped", { cause }));
    }
  }
}
function parseChallenges(lines) {
  const challenges = [];
  for (const line of lines) {
    const word = /([\s,]*)([!#$%&'*+.^_`|~0-9A-Za-z/-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"?|[^\s,"]*))?/y;
    let current;
    for (let match = word.exec(line); match !== null; match = word.exec(line)) {
      const [, separator = "", name = "", value] = match;
      if (value === void 0 && (match.index === 0 || separator.includes(","))) {
        challenges.push({ scheme: name.toLowerCase(), parameters: current = {} });
      } else if (current && value !== void 0 && !/^=*$/.test(value)) {
        const unquoted = value.startsWith('"') ? value.replace(/^"|"$/g, "").replace(/\\(.)/g, "$1") : value;
        current[name.toLowerCase()] ??= unquoted;
      }
    }
  }
  return challenges;
}
function normalizeAuthKey(key) {
  const [host = "", ...rest] = key.replace(/^https?:\/\//, "").replace(/\/(v1|v2)?\/?$/, "").split("/");
  return [HUB_HOSTS.includes(host) ? "docker.io" : host, ...rest].join("/");
}
function decodeAuthEntry(entry, source) {
  const text = (name) => typeof entry[name] === "string" ? entry[name] : "";
  const decoded = Buffer.from(text("auth"), "base64").toString("utf8").replace(/\0+$/, "");
  const [, user, word] = /^([^:]*):([^]*)$/.exec(decoded) ?? [];
  if (text("auth") !== "" && user === void 0) fail("CREDENTIALS", `${source}: its "auth" is not USER:PASSWORD in base64`);
  const [username, password] = [user ?? text("username"), word ?? text("password")];
  const [identity, bearer] = [text("identitytoken"), text("registrytoken")];
  const kind = identity ? "identity" : bearer ? "bearer" : "basic";
  const secret = identity || bearer || password;
  return username === "" && secret === "" ? void 0 : { kind, username, secret, source, stored: true };
}
function runCredentialHelper(name, input, environment) {
  const source = `docker-credential-${name}`;
  const refuse = (reason) => fail("CREDENTIALS", `the credential helper ${printable(source)} ${reason}`);
  if (!/^[\w.+-]+$/.test(name)) refuse("has a name that is not one");
  const { status, stdout, stderr, error } = spawnSync(source, ["get"], {
    input,
    env: environment,
    encoding: "utf8",
    timeout: 6e4,
    maxBuffer: LIMITS.tokenBytes
  });
  if (error) refuse(`cannot be run: ${errorCodeOf(error) === "ENOENT" ? "it is not on the PATH" : errorCodeOf(error)}`);
  const words = printable(stdout || stderr);
  if (status !== 0) return /credentials not found/i.test(words) ? void 0 : refuse(`failed: ${words || `exit code ${status}`}`);
  const { Username: username = "", Secret: secret } = parseJson(stdout) ?? refuse("answered what is not JSON");
  if (typeof username !== "string" || typeof secret !== "string") return refuse("answered without a Secret");
  const isIdentity = username === "<token>";
  const found = { username: isIdentity ? "" : username, secret, source, stored: true };
  return username === "" && secret === "" ? void 0 : { kind: isIdentity ? "identity" : "basic", ...found };
}
function credentialIn(text, source, { host, repository }, environment) {
  const file = parseJson(text);
  if (!isRecord(file)) return fail("CREDENTIALS", `${source} is not a JSON object`);
  const bestIn = (entries, isUsable) => Object.entries(isRecord(entries) ? entries : {}).filter(([key, value]) => isUsable(value) && `${host}/${repository}/`.startsWith(`${normalizeAuthKey(key)}/`)).sort(([left], [right]) => normalizeAuthKey(right).length - normalizeAuthKey(left).length)[0]?.[1];
  const helper = bestIn(file.credHelpers, (value) => typeof value === "string") ?? file.credsStore;
  const server = host === "docker.io" ? "https://index.docker.io/v1/" : host;
  const found = typeof helper === "string" && helper !== "" ? runCredentialHelper(helper, server, environment) : void 0;
  const entry = bestIn(file.auths, (value) => isRecord(value) && Object.keys(value).length > 0);
  return found ?? (isRecord(entry) ? decodeAuthEntry(entry, source) : void 0);
}
async function findCredential(settings, reference) {
  const { environment, token, username, password = "" } = settings;
  const { HOME: home = os.homedir(), DOCKER_CONFIG, XDG_RUNTIME_DIR, REGISTRY_AUTH_FILE: named } = environment;
  const option = { username: username ?? "", stored: false };
  if (token !== void 0) return { kind: "outside", secret: token, source: "--token", ...option };
  if (username !== void 0) return { kind: "basic", secret: password, source: "--user and --password", ...option };
  const file = async (name, what = `the credential file ${name}`, isRequired = false) => [name, await readCredentialFile(name, what, isRequired)];
  const places = [
    ...named ? [() => file(named, `REGISTRY_AUTH_FILE names ${named}`, true)] : [],
    async () => ["DOCKER_AUTH_CONFIG", environment.DOCKER_AUTH_CONFIG],
    () => file(path.join(DOCKER_CONFIG || path.join(home, ".docker"), "config.json")),
    ...XDG_RUNTIME_DIR ? [() => file(path.join(XDG_RUNTIME_DIR, "containers/auth.json"))] : [],
    () => file(path.join(home, ".config/containers/auth.json"))
  ];
  for (const place of places) {
    const [source, text] = await place();
    const found = text ? credentialIn(text, source, reference, environment) : void 0;
    if (found) return found;
  }
  return void 0;
}
async function readCredentialFile(file, what, isRequired) {
  try {
    if ((await fs.stat(file)).size <= LIMITS.credentialFileBytes) return await fs.readFile(file, "utf8");
  } catch (cause) {
    if (!isRequired && ["ENOENT", "ENOTDIR", "ERR_ACCESS_DENIED"].includes(errorCodeOf(cause))) return void 0;
    fail("CREDENTIALS", `${what}: ${diskWords(cause)}`, { cause });
  }
  return fail("CREDENTIALS", `${what}: too large for a credential file`);
}
async function fetchToken(session, origin, scope, challenge, credential) {
  const { realm = "", service } = challenge.parameters;
  if (realm === "" || !URL.canParse(realm, origin)) fail("PROTOCOL", `${origin} asks for a token and names no usable realm`);
  const url = new URL(realm, origin);
  const where = redactUrl(url);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && origin.startsWith("http:"))) {
    fail("PROTOCOL", `${origin} names the token endpoint ${where}: not over ${url.protocol}`);
  }
  const query = { ...given({ service }), scope };
  const ask = (method, target, authorization, body) => session.transport.send({
    method,
    url: target,
    signal: session.signal,
    ...given({ body }),
    headers: body === void 0 ? {} : { "Content-Type": "application/x-www-form-urlencoded" },
    authorizationFor: async (each) => each === target.origin ? authorization : void 0,
    isRegistry: (each) => each === origin
  });
  let answer;
  if (credential?.kind === "identity") {
    const grant = { grant_type: "refresh_token", client_id: "imgpull", refresh_token: credential.secret };
    answer = await ask("POST", url, void 0, new URLSearchParams({ ...query, ...grant }).toString());
    if ([400, 401, 404, 405].includes(answer.status) || answer.status >= 300 && answer.status < 400) answer = void 0;
  }
  if (!answer) {
    const target = new URL(url);
    for (const [name, value] of Object.entries(query)) target.searchParams.set(name, value);
    const username = credential?.username || "00000000-0000-0000-0000-000000000000";
    answer = await ask("GET", target, credential && basicAuthorization(username, credential.secret));
  }
  if (!answer.body) throw statusError(answer, session.clock.now(), "the token service");
  const json = parseJson(await readBody(answer.body, LIMITS.tokenBytes, `the token of ${where}`));
  const { token, access_token: accessToken, expires_in: seconds } = isRecord(json) ? json : {};
  const text = token || accessToken;
  if (typeof text !== "string" || !/^[\x21-\x7e]+$/.test(text)) return fail("PROTOCOL", `${where} answered without a token`);
  const lifeMs = Math.max(LIMITS.tokenFloorMs, typeof seconds === "number" ? seconds * 1e3 : 0);
  return { header: `Bearer ${text}`, expiresAt: session.clock.now() + lifeMs };
}
function statusError({ status, words, headers, url }, now, who, isRegistry = true) {
  const retryAfterMs = parseRetryAfter(headers["retry-after"], now);
  const said = `${redactUrl(url)}: ${who} answered ${status}${words ? ` (${words})` : ""}`;
  if (status === 429) {
    const when = retryAfterMs === void 0 ? "try again later" : `come back in ${Math.ceil(retryAfterMs / 1e3)} s, at ${new Date(now + Math.min(retryAfterMs, 1e12)).toISOString()}`;
    return new ImgpullError("RATE_LIMITED", `${said}
  too many requests: ${when}`, { status, retryAfterMs });
  }
  if (status === 407) return new ImgpullError("PROXY", said + PROXY_REMEDY, { status });
  const isExpired = !isRegistry && [400, 401, 403].includes(status);
  const code = { 401: "UNAUTHORIZED", 403: "FORBIDDEN", 404: "NOT_FOUND" }[status] ?? "PROTOCOL";
  const remedy = /HTTP request (was sent )?to (an )?HTTPS/i.test(words) ? "\n  this port is https: try without --scheme http" : "";
  const details = { status, retryAfterMs: isExpired ? 0 : status >= 500 ? retryAfterMs : void 0 };
  return new ImgpullError(code, said + remedy, details);
}
var Registry = class {
  reference;
  origin;
  /** False once it has answered a range with the whole. */
  acceptsRanges = true;
  /** The quickest answer so far: how far away it is. */
  latencyMs = NEVER;
  #session;
  #held = /* @__PURE__ */ new Map();
  #renewals = /* @__PURE__ */ new Map();
  #found;
  #isAnonymous = false;
  constructor(session, reference) {
    const { scheme, token } = session.settings;
    this.#session = session;
    this.reference = reference;
    this.origin = new URL(`${scheme}://${apiHost(reference.host)}`).origin;
    if (token !== void 0) this.#held.set(this.origin, { header: `Basic ${token}`, expiresAt: NEVER });
  }
  /** One answer to one request, after at most one handshake, one renewal and one fallback. */
  async #request(method, rest, headers, signal) {
    const url = new URL(`${this.origin}/v2/${this.reference.repository}/${rest}`);
    const { namespace } = this.#session.settings;
    if (namespace !== void 0) url.searchParams.set("ns", namespace);
    const authorizationFor = (origin) => this.#authorizationFor(origin);
    const isRegistry = (origin) => origin === this.origin;
    for (let round = 0; ; round += 1) {
      const answer = await this.#session.transport.send({ method, url, headers, signal, authorizationFor, isRegistry });
      const { status, authorization: sent } = answer;
      const isStale = sent !== void 0 && (status === 400 && sent.startsWith("Bearer ") || status === 403);
      if (!(status === 401 || isStale) || round === 3 || !await this.#authorize(answer, round)) return answer;
    }
  }
  async #authorizationFor(origin) {
    const held = this.#held.get(origin);
    if (held && held.expiresAt > this.#session.clock.now()) return held.header;
    const isBearer = this.#session.challenges.get(origin)?.some(({ scheme }) => scheme === "bearer");
    if (isBearer) await this.#handshake(origin);
    return this.#held.get(origin)?.header;
  }
  /** Whether another attempt may go better than the one that got `answer`. */
  async #authorize(answer, round) {
    const { url: { origin }, authorization: sent, status, headers } = answer;
    if (this.#held.get(origin)?.header !== sent) return true;
    const challenges = parseChallenges([headers["www-authenticate"] ?? []].flat());
    const isRenewal = round === 0 && sent !== void 0 && this.#session.challenges.has(origin);
    if (challenges.length > 0 && !isRenewal) this.#session.challenges.set(origin, challenges);
    const credential = await this.#credentialFor(origin);
    if (credential?.kind === "outside") return false;
    if (status === 403 || round > 0 && sent !== void 0 || sent?.startsWith("Basic ")) {
      if (!credential?.stored) return false;
      this.#giveUp(credential, `${redactUrl(answer.url)}: ${status}`);
    }
    return this.#handshake(origin);
  }
  /** Looked up when a registry asks for it first; storage hosts and other origins never get it. */
  async #credentialFor(origin) {
    if (this.#isAnonymous || origin !== this.origin) return void 0;
    return this.#found ??= findCredential(this.#session.settings, this.reference);
  }
  #giveUp({ source }, reason) {
    this.#isAnonymous = true;
    this.#held.delete(this.origin);
    this.#session.warn(`the credentials of ${source} were refused (${reason}); trying without any`);
  }
  /** Connections that are refused at the same time get one new token between them. */
  #handshake(origin) {
    const running = this.#renewals.get(origin) ?? this.#answerChallenge(origin).finally(() => this.#renewals.delete(origin));
    this.#renewals.set(origin, running);
    return running;
  }
  async #answerChallenge(origin) {
    const challenges = this.#session.challenges.get(origin) ?? [];
    const credential = await this.#credentialFor(origin);
    const bearer = challenges.find(({ scheme }) => scheme === "bearer");
    const isBasic = challenges.some(({ scheme }) => scheme === "basic") && credential?.kind === "basic";
    if (!bearer && !isBasic) return false;
    if (!bearer || credential?.kind === "bearer") {
      const { username, secret } = credential;
      const header = bearer ? `Bearer ${secret}` : basicAuthorization(username, secret);
      this.#held.set(origin, { header, expiresAt: NEVER });
      return true;
    }
    const ours = `repository:${this.reference.repository}:pull`;
    const scope = origin === this.origin ? ours : bearer.parameters.scope ?? ours;
    const ask = (holder) => fetchToken(this.#session, origin, scope, bearer, holder);
    this.#held.set(origin, await ask(credential).catch(async (error) => {
      if (![400, 401, 403, 404].includes(error.status ?? 0)) throw error;
      if (!credential?.stored) throw error.status === 401 || credential ? await this.#withTried(error) : error;
      this.#giveUp(credential, error.message);
      return ask().catch(async (refusal) => {
        throw refusal.status === 401 ? await this.#withTried(refusal) : refusal;
      });
    }));
    return true;
  }
  /** The error with the word of which credentials were tried, and from where. */
  async #withTried({ code, message, status }) {
    const credential = await this.#credentialFor(this.origin);
    const tried = this.#isAnonymous ? `the stored credentials (${(await this.#found)?.source}) were refused, and so was a request without any` : credential ? `refused: the credentials of ${credential.source}` : "no credentials were found for this registry (--user, --token, docker login); a repository that does not exist is often answered the same way";
    return new ImgpullError(code === "FORBIDDEN" ? code : "UNAUTHORIZED", `${message}
  ${tried}`, { status });
  }
  /** A refusal in the user's terms. */
  async #refusal(answer, what) {
    const isRegistry = answer.url.origin === this.origin;
    const who = isRegistry ? "the registry" : "the storage host";
    const error = statusError(answer, this.#session.clock.now(), who, isRegistry);
    const isName = /NAME_UNKNOWN|repository name not known/i.test(answer.words);
    const missing = isName ? `repository: ${this.reference.host}/${this.reference.repository}` : what;
    const { code, status, retryAfterMs } = error;
    const doubt = answer.headers["content-type"]?.includes("html") ? `: is ${this.reference.host} a registry?` : "";
    if (code === "NOT_FOUND") return new ImgpullError(code, `no such ${missing}
  ${error.message}${doubt}`, { status });
    const isOurs = (code === "UNAUTHORIZED" || code === "FORBIDDEN") && retryAfterMs === void 0;
    return isOurs ? this.#withTried(error) : error;
  }
  /** One attempt at a manifest's answer; it has a body. */
  async #manifestAnswer(method, tagOrDigest) {
    const accept = { Accept: MANIFEST_TYPES.join(", ") };
    const answer = await this.#request(method, `manifests/${tagOrDigest}`, accept, this.#session.signal);
    const { host, repository } = this.reference;
    const what = isDigest(tagOrDigest) ? `manifest: ${tagOrDigest}` : `tag: ${host}/${repository}:${tagOrDigest}`;
    if (!answer.body) throw await this.#refusal(answer, what);
    return answer;
  }
  /** The manifest of a tag or digest, verified against the digest where one was asked for. */
  manifest(tagOrDigest) {
    return withRetries(this.#session, async () => {
      const startedAt = performance.now();
      const { body, url, headers } = await this.#manifestAnswer("GET", tagOrDigest);
      this.latencyMs = Math.min(this.latencyMs, performance.now() - startedAt);
      const where = redactUrl(url);
      const bytes = await readBody(body, LIMITS.manifestBytes, `the manifest ${where}`);
      const digest = digestOf(bytes, isDigest(tagOrDigest) ? tagOrDigest : void 0);
      const isWrong = isDigest(tagOrDigest) && digest !== tagOrDigest;
      if (isWrong) fail("DIGEST_MISMATCH", `${where}: the manifest's bytes have the digest ${digest}`);
      const mediaType = sniffMediaType(bytes, headers["content-type"]);
      if (mediaType !== void 0) return { mediaType, digest, bytes };
      const type = printable(headers["content-type"] ?? "nothing named", 80);
      return fail("PROTOCOL", `${where}: the answer is not a manifest but ${type}: is ${this.reference.host} a registry?`);
    });
  }
  /** What HEAD tells of a manifest; undefined where the registry leaves something out. */
  head(tagOrDigest) {
    return withRetries(this.#session, async () => {
      const { headers, body } = await this.#manifestAnswer("HEAD", tagOrDigest);
      body?.resume();
      const { "docker-content-digest": digest, "content-length": length = "", "content-type": type = "" } = headers;
      const mediaType = type.split(";")[0]?.trim() ?? "";
      const isWhole = isDigest(digest) && Number(length) > 0 && MANIFEST_TYPES.includes(mediaType);
      return isWhole ? { mediaType, digest, size: Number(length) } : void 0;
    });
  }
  /** One answer, with a body, to a request for a blob's bytes [from, to). The caller checks what comes. */
  async blob({ digest, size, urls = [] }, from, to, signal) {
    const headers = from === 0 && to === size ? {} : { Range: `bytes=${from}-${to - 1}` };
    let answer = await this.#request("GET", `blobs/${digest}`, headers, signal);
    if (answer.body) return answer;
    const foreign = answer.status === 404 ? urls.filter((url) => URL.canParse(url) && url.startsWith("https:")) : [];
    if (foreign.length === 0) throw await this.#refusal(answer, `blob: ${digest}`);
    for (const url of foreign) {
      const anyone = { authorizationFor: async () => void 0, isRegistry: () => false };
      answer = await this.#session.transport.send({ method: "GET", url: new URL(url), headers, signal, ...anyone });
      if (answer.body) return answer;
    }
    throw statusError(answer, this.#session.clock.now(), "the foreign layer's host");
  }
};
function registryOf(session, reference) {
  const key = `${reference.host}/${reference.repository}`;
  const registry = session.registries.get(key) ?? new Registry(session, reference);
  session.registries.set(key, registry);
  return registry;
}
function sniffMediaType(bytes, contentType = "") {
  const header = contentType.split(";")[0]?.trim().toLowerCase() ?? "";
  const json = parseJson(bytes);
  if (!isRecord(json)) return void 0;
  if (typeof json.mediaType === "string") return json.mediaType;
  if (json.schemaVersion === 1) return DOCKER_SCHEMA_1;
  if (MANIFEST_TYPES.includes(header)) return header;
  return Array.isArray(json.manifests) ? OCI_INDEX : isRecord(json.config) ? OCI_MANIFEST : void 0;
}
function parseDescriptor(value, where) {
  const refuse = (reason) => fail("PROTOCOL", `${where}: ${reason}`);
  if (!isRecord(value)) return refuse("a descriptor is not an object");
  const { mediaType: type, digest, size, urls, platform: words } = value;
  if (!isDigest(digest)) return refuse(`"${printable(String(digest), 100)}" is not a digest that is safe to use`);
  if (typeof size !== "number" || !Number.isSafeInteger(size) || size < 0) {
    return refuse(`${digest} has the size ${printable(JSON.stringify(size) ?? "none", 40)}, which is not a number of bytes`);
  }
  const isUrlList = Array.isArray(urls) && urls.length > 0 && urls.every((url) => typeof url === "string");
  const platform = isRecord(words) ? parsePlatform(words) : void 0;
  const mediaType = typeof type === "string" ? type : "";
  return { mediaType, digest, size, ...given({ urls: isUrlList ? urls : void 0, platform }) };
}
function parsePlatform(value) {
  const word = (name) => typeof value[name] === "string" ? printable(value[name], 64) : "";
  return { os: word("os"), architecture: word("architecture"), ...given({ variant: word("variant") }) };
}
function parseManifest({ bytes, mediaType }, where) {
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
  if (isIndex === isImage || isIndex && Array.isArray(layers) || isOther) {
    fail("PROTOCOL", `${where}: ${printable(mediaType, 100)} with the fields of something else`);
  }
  const tooLarge = (what) => fail("TOO_LARGE", `${where}: ${what}`);
  if (isIndex) {
    if (manifests.length > LIMITS.indexEntries) tooLarge(`an index of more than ${LIMITS.indexEntries} entries`);
    return { kind: "index", manifests: manifests.map((entry) => parseDescriptor(entry, where)) };
  }
  const config = parseDescriptor(json.config, where);
  if (config.size > LIMITS.configBytes) tooLarge(`its config of ${config.size} bytes is larger than ${LIMITS.configBytes}`);
  return { kind: "image", config, layers: layers.map((layer) => parseDescriptor(layer, where)) };
}
function hostPlatform() {
  const { arch, platform } = process;
  const systems = { win32: "windows", sunos: "solaris" };
  const ppc64 = os.endianness() === "LE" ? "ppc64le" : "ppc64";
  const processors = { x64: "amd64", ia32: "386", mipsel: "mipsle", ppc64 };
  const { arm_version: version = "7" } = process.config.variables;
  const variant = arch === "arm" ? `v${version}` : void 0;
  return { os: systems[platform] ?? platform, architecture: processors[arch] ?? arch, ...given({ variant }) };
}
function acceptableVariants(architecture, variant) {
  const [lowest, plain] = { arm: [5, 7], arm64: [8, 8], amd64: [1, 1] }[architecture] ?? [];
  if (lowest === void 0) return variant === void 0 ? ["", "*"] : [variant];
  const level = Number(/^v(\d{1,2})$/.exec(variant ?? `v${plain}`)?.[1]);
  if (Number.isNaN(level)) return [variant];
  const down = Array.from({ length: Math.max(0, level - lowest + 1) }, (_, index) => level - index);
  return variant === void 0 ? ["", ...down.map((each) => `v${each}`)] : down.flatMap((each) => each === plain ? [`v${each}`, ""] : [`v${each}`]);
}
function matchPlatform(candidates, wanted) {
  const fitting = candidates.filter(
    ({ platform }) => platform?.os === wanted.os && platform.architecture === wanted.architecture
  );
  const ofVariant = (variant) => fitting.find(({ platform }) => variant === "*" || (platform?.variant ?? "") === variant);
  return acceptableVariants(wanted.architecture, wanted.variant).map(ofVariant).find((found) => found !== void 0);
}
function wantedPlatform(wanted, host = hostPlatform()) {
  const variant = wanted.variant ?? (wanted.architecture === void 0 ? host.variant : void 0);
  return { os: wanted.os ?? host.os, architecture: wanted.architecture ?? host.architecture, ...given({ variant }) };
}
var BLOCK = 512;
var paddingOf = (sizeBytes) => (BLOCK - sizeBytes % BLOCK) % BLOCK;
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
  header.write(`${octal(sumOf(header, (byte) => byte), 7)} `, 148, "latin1");
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
  const isLarge = sizeBytes > 8589934591;
  const plain = encodeUstarHeader(name.slice(0, 100), isLarge ? 0 : sizeBytes, "0");
  const records = (name.length > 100 ? record("path", name) : "") + (isLarge ? record("size", `${sizeBytes}`) : "");
  if (records === "") return plain;
  const padded = Buffer.concat([Buffer.from(records, "latin1")], records.length + paddingOf(records.length));
  return Buffer.concat([encodeUstarHeader("PaxHeaders/blob", records.length, "x"), padded, plain]);
}
var blobPath = (digest) => `blobs/${digest.replace(":", "/")}`;
function indexEntry({ name, top }) {
  const annotations = { "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name };
  return { mediaType: top.mediaType, digest: top.digest, size: top.bytes.length, annotations };
}
function dockerEntry({ name, contents }) {
  const images = contents.filter(({ manifest }) => CONFIG_TYPES.includes(manifest.config.mediaType));
  const image = images.find(({ platform }) => formatPlatform(platform) === "linux/amd64") ?? images[0];
  if (!image) return void 0;
  const { config, layers } = image.manifest;
  const tags = name.includes("@") ? [] : [name];
  return { Config: blobPath(config.digest), RepoTags: tags, Layers: layers.map(({ digest }) => blobPath(digest)) };
}
function planTar(images, omit = /* @__PURE__ */ new Set()) {
  const contents = /* @__PURE__ */ new Map();
  const addBytes = (name, bytes) => contents.set(name, { sizeBytes: bytes.length, bytes });
  const omitted = /* @__PURE__ */ new Map();
  addBytes("oci-layout", encodeJson({ imageLayoutVersion: "1.0.0" }));
  addBytes("index.json", encodeJson({ schemaVersion: 2, mediaType: OCI_INDEX, manifests: images.map(indexEntry) }));
  addBytes("manifest.json", encodeJson(images.map(dockerEntry).filter((entry) => entry !== void 0)));
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
  const entries = [];
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
async function readAt(handle, position, length, buffer = Buffer.alloc(length)) {
  for (let filled = 0; ; ) {
    const { bytesRead } = await handle.read(buffer, filled, length - filled, position + filled);
    filled += bytesRead;
    if (bytesRead === 0 || filled === length) return buffer.subarray(0, filled);
  }
}
async function* readTar(handle, where) {
  const refuse = (reason) => fail("BAD_TAR", `${where}: ${reason}`);
  const { size } = await handle.stat();
  let extended = {};
  for (let position = 0; position < size; ) {
    const header = await readAt(handle, position, BLOCK);
    if (header.length < BLOCK) refuse("it ends in the middle of a header");
    if (header.every((byte) => byte === 0)) return;
    const text = (start, length) => untilNul(header.subarray(start, start + length));
    const checksum = sumOf(header, (byte) => byte) - sumOf(header.subarray(148, 156), (byte) => byte - 32);
    if (Number.parseInt(text(148, 8).trim(), 8) !== checksum) refuse("it is not a tar, or is damaged (a header's checksum)");
    const isBinary = ((header[124] ?? 0) & 128) !== 0;
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
var untilNul = (bytes) => bytes.toString("utf8").split("\0", 1)[0] ?? "";
function parsePaxRecords(body) {
  const records = {};
  for (let at = 0; at < body.length; ) {
    const space = body.indexOf(32, at);
    const length = Number(body.toString("latin1", at, Math.max(space, at)));
    if (space < 0 || !Number.isInteger(length) || length <= space - at) break;
    const [key = "", ...value] = body.toString("utf8", space + 1, at + length - 1).split("=");
    records[key] = value.join("=");
    at += length;
  }
  return records;
}
function digestInName(name) {
  const [, blob, bare] = /^(?:blobs\/(sha\d+\/[0-9a-f]+)|(?:sha256:)?([0-9a-f]{64})(?:\.json|\.tar|\.tar\.gz)?)$/.exec(name) ?? [];
  const digest = blob?.replace("/", ":") ?? `sha256:${bare}`;
  return isDigest(digest) ? digest : void 0;
}
async function openTar(file) {
  const handle = await onDisk(`cannot read ${file}`, fs.open(file, "r"));
  try {
    const [entries, blobs] = [/* @__PURE__ */ new Map(), /* @__PURE__ */ new Map()];
    for await (const entry of readTar(handle, file)) {
      const digest = digestInName(entry.name);
      entries.set(entry.name, entry);
      if (digest !== void 0 && (entry.type === "0" || entry.type === "7")) blobs.set(digest, entry);
    }
    return { handle, entries, blobs };
  } catch (error) {
    await handle.close();
    throw error;
  }
}
var lengthOf = (ranges) => sumOf(ranges, ([from, to]) => to - from);
function addRange(ranges, [from, to]) {
  const isApart = ([start, end]) => end < from || start > to;
  const edges = [from, to, ...ranges.filter((range) => !isApart(range)).flat()];
  const merged = [Math.min(...edges), Math.max(...edges)];
  return [...ranges.filter(isApart), merged].sort((left, right) => left[0] - right[0]);
}
function missingRanges(ranges, sizeBytes) {
  const ends = [...ranges.map(([start]) => start), sizeBytes];
  const gaps = [0, ...ranges.map(([, end]) => end)].map((start, at) => [start, ends[at]]);
  return gaps.filter(([from, to]) => from < to);
}
var FRESH = { hashedTo: 0, hashing: void 0, unrecordedBytes: 0, openSegments: 0, doneBytes: 0 };
function newJob(descriptor, registry, offset, tars) {
  const { digest, size } = descriptor;
  const origins = tars.flatMap(({ handle, blobs }) => {
    const entry = blobs.get(digest);
    return entry?.sizeBytes === size ? [{ handle, offset: entry.offset }] : [];
  });
  const state = { ...FRESH, hash: newHash(digest), written: [], freshStarts: 1, isDone: false };
  return { descriptor, registry, offset, origins, ...state };
}
var newJobs = ({ entries }, tars, isOwnFile = false) => entries.flatMap(
  ({ blob, offset }) => blob ? [newJob(blob.descriptor, blob.registry, isOwnFile ? 0 : offset, tars)] : []
);
var startAfresh = (job) => Object.assign(job, FRESH, { hash: newHash(job.descriptor.digest), written: [] });
var isRight = ({ hash, descriptor }) => hash.digest("hex") === hexOf(descriptor.digest);
function newTransfer({ settings }, jobs, observe) {
  const totalBytes = sumOf(jobs, ({ descriptor }) => descriptor.size);
  const counters = { connections: settings.concurrency, fetchedBytes: 0, reusedBytes: 0, resumedBytes: 0 };
  return { jobs, totalBytes, observe, pending: [], active: /* @__PURE__ */ new Set(), ...counters };
}
function newSegment(job, at, to, isTakeover = false) {
  job.openSegments += 1;
  return { job, at, to, isTakeover, startedAtMs: 0, firstByteMs: 0, receivedBytes: 0 };
}
var remaining = ({ at, to }) => to - at;
function cutInHalf(segment) {
  const middle = segment.at + Math.ceil(remaining(segment) / 2);
  const rest = newSegment(segment.job, middle, segment.to, true);
  segment.to = middle;
  return rest;
}
function longestRange(segments) {
  const canCut = ({ job: { origins, registry }, at, to }) => origins.length === 0 && registry.acceptsRanges && to - at >= 2 * (registry.latencyMs < LIMITS.farLatencyMs ? LIMITS.nearSplitBytes : LIMITS.splitBytes);
  return [...segments].filter(canCut).sort((left, right) => remaining(right) - remaining(left))[0];
}
function isWorthTaking(victim, active) {
  const now = performance.now();
  const rateOf = ({ receivedBytes, startedAtMs }) => receivedBytes / Math.max(1, now - startedAtMs);
  const age = now - victim.startedAtMs;
  if (age < 50 || sumOf(active, rateOf) * 1e3 > LIMITS.fastLineBytesPerSecond) return false;
  return remaining(victim) / Math.max(rateOf(victim), 1) > Math.max(50, 4 * (victim.firstByteMs || age));
}
function enqueue({ pending }, sink, job) {
  const unit = sink.unitBytes(job);
  for (const [from, to] of missingRanges(job.written, job.descriptor.size)) {
    for (let at = from; at < to; at += unit) pending.push(newSegment(job, at, Math.min(to, at + unit)));
  }
  if (job.openSegments === 0) pending.push(newSegment(job, 0, 0));
}
async function fetchBlobs(outer, transfer, sink) {
  const stop = new AbortController();
  const session = { ...outer, signal: AbortSignal.any([outer.signal, stop.signal]) };
  const { active, jobs, pending, observe } = transfer;
  let idle = [];
  for (const job of jobs) if (!job.isDone) enqueue(transfer, sink, job);
  if (sink.isSplitting) {
    const isFar = ({ job }) => job.registry.latencyMs >= LIMITS.farLatencyMs;
    for (let next; pending.length < transfer.connections && (next = longestRange(pending.filter(isFar))); ) {
      pending.push(cutInHalf(next));
    }
    pending.sort((left, right) => remaining(right) - remaining(left));
  }
  const take = () => {
    const victim = pending.length > 0 || !sink.isSplitting ? void 0 : longestRange(active);
    return pending.shift() ?? (victim && isWorthTaking(victim, active) ? cutInHalf(victim) : void 0);
  };
  const lane = async () => {
    while (!session.signal.aborted && active.size < transfer.connections && pending.length + active.size > 0) {
      const segment = take();
      if (!segment) {
        await new Promise((resolve) => {
          const timer = setTimeout(resolve, 20);
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
  const stopAll = (error) => {
    stop.abort();
    throw error;
  };
  const results = await Promise.allSettled(Array.from({ length: transfer.connections }, () => lane().catch(stopAll)));
  if (outer.signal.aborted) fail("ABORTED", "stopped");
  settled(results);
}
function fetchSegment(session, transfer, sink, segment) {
  let before = segment.at;
  const gotOn = () => {
    const isEnough = segment.at - before >= Math.min(LIMITS.batchBytes, Math.ceil(segment.job.descriptor.size / 64));
    before = segment.at;
    return isEnough;
  };
  return withRetries(session, async () => {
    while (segment.at < segment.to) {
      await receive(session, transfer, sink, segment).catch((error) => {
        const isCrowded = error instanceof ImgpullError && error.code === "RATE_LIMITED" && segment.isTakeover;
        if (!isCrowded || !giveBack(transfer, segment)) throw error;
        transfer.connections = Math.max(1, transfer.active.size - 1);
      });
    }
  }, gotOn);
}
function giveBack({ active }, segment) {
  const owner = [...active].find(({ job, at, to }) => job === segment.job && to === segment.at && at < to);
  if (!owner) return false;
  owner.to = segment.to;
  segment.to = segment.at;
  return true;
}
function takeFollowers({ pending }, segment) {
  const follows = ({ job, at }) => job === segment.job && at === segment.to;
  for (let next = pending.findIndex(follows); next >= 0; next = pending.findIndex(follows)) {
    segment.to = pending.splice(next, 1)[0].to;
    segment.job.openSegments -= 1;
  }
}
async function openSegment(session, transfer, segment) {
  const { job: { descriptor: { size }, descriptor, registry, origins: [origin] }, at, to } = segment;
  if (origin) {
    const range = { start: origin.offset + at, end: origin.offset + to - 1, autoClose: false, highWaterMark: MIB };
    return { stream: origin.handle.createReadStream(range), doing: "reading a tar at hand", position: at, end: to };
  }
  const { body, headers, status, url } = await registry.blob(descriptor, at, to, session.signal);
  if (!body) return void 0;
  const doing = `GET ${redactUrl(url)}`;
  const refuse = (code, words) => {
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
async function receive(session, transfer, sink, segment) {
  const { job } = segment;
  Object.assign(segment, { startedAtMs: performance.now(), firstByteMs: 0, receivedBytes: 0 });
  const opened = await openSegment(session, transfer, segment);
  if (!opened) return;
  const { stream, doing, end } = opened;
  const counter = job.origins.length > 0 ? "reusedBytes" : "fetchedBytes";
  segment.firstByteMs = performance.now() - segment.startedAtMs;
  let { position } = opened;
  let [gathered, gatheredBytes] = [[], 0];
  let writing = Promise.resolve();
  const flush = async () => {
    const [chunks, from, previous] = [gathered, segment.at - gatheredBytes, writing];
    [gathered, gatheredBytes] = [[], 0];
    writing = previous.then(() => sink.write(job, from, chunks));
    writing.catch(() => void 0);
    await previous;
    transfer.observe(transfer);
  };
  const take = (wanted) => {
    sink.accept(job, segment.at, wanted);
    gathered.push(wanted);
    gatheredBytes += wanted.length;
    segment.at += wanted.length;
    segment.receivedBytes += wanted.length;
    job.doneBytes += wanted.length;
    transfer[counter] += wanted.length;
  };
  const writer = new Writable({
    write: (chunk, _encoding, callback) => {
      const skipped = Math.min(chunk.length, Math.max(0, segment.at - position));
      const wanted = chunk.subarray(skipped, skipped + remaining(segment));
      position += chunk.length;
      if (wanted.length > 0) take(wanted);
      if (position > end || segment.at >= segment.to && position < end) stream.destroy();
      if (gatheredBytes < LIMITS.batchBytes) callback();
      else flush().then(() => callback(), callback);
    }
  });
  const failure = await pipeline(stream, writer, { signal: session.signal }).then(() => void 0, (error) => error);
  if (gatheredBytes > 0) await flush();
  await writing;
  if (position > end) fail("SIZE_MISMATCH", `${doing}: more than the ${end} bytes that belong there`);
  if (segment.at >= segment.to) return;
  if (session.signal.aborted) fail("ABORTED", "stopped");
  if (failure instanceof ImgpullError) throw failure;
  if (position < end) fail("NETWORK", `${doing}: the connection ended after ${position} of ${end} bytes`, { cause: failure });
}
async function hashPlace(handle, from, to, hash) {
  const buffer = Buffer.allocUnsafe(Math.min(LIMITS.batchBytes, to - from));
  for (let at = from; at < to; ) {
    const piece = await readAt(handle, at, Math.min(buffer.length, to - at), buffer);
    if (piece.length === 0) fail("DISK", "a file became shorter while it was read");
    hash.update(piece);
    at += piece.length;
  }
  return hash;
}
var isIntact = async ({ handle, offset }, { digest, size }) => (await hashPlace(handle, offset, offset + size, newHash(digest))).digest("hex") === hexOf(digest);
async function writeAll(handle, chunks, position) {
  const { bytesWritten } = await handle.writev(chunks, position);
  if (bytesWritten === sumOf(chunks, ({ length }) => length)) return;
  await writeAll(handle, [Buffer.concat(chunks).subarray(bytesWritten)], position + bytesWritten);
}
async function openJournal(file, planId) {
  const [id, ...lines] = (await readOptional(file) ?? "").split("\n");
  const held = /* @__PURE__ */ new Map();
  for (const line of id === planId ? lines : []) {
    const [, digest = "", text = ""] = /^(\S+) ([\d,-]*);$/.exec(line) ?? [];
    const ranges = text.split(",").map((range) => range.split("-").map(Number));
    held.set(digest, ranges.filter(([from, to]) => from < to).reduce(addRange, []));
  }
  const handle = await fs.open(file, id === planId ? "a" : "w");
  let writing = id === planId ? Promise.resolve() : handle.appendFile(`${planId}
`);
  const record = (job) => {
    job.unrecordedBytes = 0;
    const line = `${job.descriptor.digest} ${job.written.map((range) => range.join("-")).join(",")};
`;
    writing = writing.then(() => handle.appendFile(line)).catch(() => void 0);
  };
  return { held, record, close: () => writing.catch(() => void 0).then(() => handle.close()) };
}
var isRunning = (pid) => {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return errorCodeOf(error) === "EPERM";
  }
};
async function acquireLock(file, dest) {
  const [host, since] = [os.hostname(), performance.timeOrigin];
  const mine = JSON.stringify({ pid: process.pid, host, since, id: Math.random() });
  const busy = (who) => fail("DISK", `${dest} is being pulled by another imgpull${who}`);
  await fs.writeFile(file, mine, { flag: "wx" }).catch(async (error) => {
    if (errorCodeOf(error) !== "EEXIST") throw error;
    const owner = parseJson(await readOptional(file) ?? "") ?? {};
    const { mtimeMs } = await fs.stat(file).catch(() => ({ mtimeMs: 0 }));
    const isThere = owner.pid === process.pid ? owner.since === since : isRunning(Number(owner.pid));
    const isHeld = Date.now() - mtimeMs < 6 * LIMITS.lockBeatMs && (owner.host !== host || isThere);
    if (owner.pid && isHeld) busy(` (process ${owner.pid} on ${owner.host})`);
    await fs.writeFile(`${file}.${process.pid}`, mine);
    await fs.rename(`${file}.${process.pid}`, file);
    await delay(20);
    if (await readOptional(file) !== mine) busy("");
  });
  const beat = () => void fs.utimes(file, /* @__PURE__ */ new Date(), /* @__PURE__ */ new Date()).catch(() => void 0);
  const timer = setInterval(beat, LIMITS.lockBeatMs).unref();
  return () => (clearInterval(timer), fs.rm(file, { force: true }));
}
function fileSink({ warn }, places, journal) {
  const catchUp = (job) => job.hashing ??= (async () => {
    for (; ; ) {
      const to = job.written.find(([from, end]) => from <= job.hashedTo && end > job.hashedTo)?.[1];
      if (to === void 0) return;
      await hashPlace(await places.open(job), job.offset + job.hashedTo, job.offset + to, job.hash);
      job.hashedTo = to;
    }
  })().finally(() => job.hashing = void 0);
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
      if (position <= job.hashedTo && job.hashedTo < end) catchUp(job).catch(() => void 0);
    },
    segmentDone: (job) => journal.record(job),
    blobDone: async (job) => {
      while (job.hashedTo < job.descriptor.size) await catchUp(job);
      if (isRight(job)) {
        await places.finish(job);
        journal.record(job);
        return true;
      }
      if (job.origins.shift()) return false;
      const wrong = `${job.descriptor.digest}: the bytes have another digest`;
      job.freshStarts -= 1;
      if (job.freshStarts < 0) {
        journal.record(startAfresh(job));
        fail("DIGEST_MISMATCH", `${wrong}, twice, from ${job.registry.origin}`);
      }
      warn(`${wrong}; fetching the blob once more`);
      return false;
    }
  };
}
async function fillPlaces(session, transfer, base, planId, places) {
  const { jobs, observe } = transfer;
  const journal = await openJournal(`${base}.journal`, planId);
  const sink = fileSink(session, places, journal);
  try {
    for (const job of jobs) {
      const { descriptor: { digest, size } } = job;
      const ranges = journal.held.get(digest) ?? [];
      const placeEnd = ranges.length === 0 ? 0 : (await (await places.open(job)).stat()).size - job.offset;
      job.written = ranges.filter(([, to]) => to <= size && to <= placeEnd);
      job.doneBytes = lengthOf(job.written);
      transfer.resumedBytes += job.doneBytes;
      if (job.doneBytes === 0) continue;
      job.origins.length = 0;
      job.freshStarts += 1;
      if (job.doneBytes < size) continue;
      job.isDone = await sink.blobDone(job);
      if (job.isDone) observe(transfer, job);
      else startAfresh(job);
    }
    await fetchBlobs(session, transfer, sink);
    return transfer;
  } finally {
    await Promise.all(jobs.map((job) => job.hashing?.catch(() => void 0)));
    for (const job of jobs) if (job.unrecordedBytes > 0) journal.record(job);
    await journal.close();
  }
}
async function syncQuietly(handle) {
  await handle.sync().catch((error) => {
    if (!["ERR_ACCESS_DENIED", "EINVAL", "ENOSYS", "ENOTSUP", "EPERM"].includes(errorCodeOf(error))) throw error;
  });
}
async function syncFolder(folder) {
  const handle = await fs.open(folder, "r").catch(() => void 0);
  if (handle) await syncQuietly(handle).finally(() => handle.close());
}
async function checkFreeSpace(dest, folder, neededBytes) {
  const { bavail, bsize } = await fs.statfs(folder).catch(() => ({ bavail: NEVER, bsize: 1 }));
  const [needed, free] = [formatBytes(neededBytes), formatBytes(bavail * bsize)];
  const words = `cannot write ${dest}: the disk is full, ${needed} are needed and ${folder} has ${free} free`;
  if (neededBytes > bavail * bsize) fail("DISK", words);
}
var openForUpdate = (file) => fs.open(file, fs.constants.O_RDWR | fs.constants.O_CREAT, 438);
async function pullToTar(session, plan, dest, reuse, observe) {
  const partial = `${dest}.partial`;
  const unlock = await acquireLock(`${partial}.lock`, dest);
  const opened = [];
  let isWorthKeeping = true;
  try {
    const isOurs = (await readOptional(`${partial}.journal`))?.split("\n")[0] === plan.id && (await fs.stat(partial).catch(() => void 0))?.size === plan.sizeBytes;
    isWorthKeeping = isOurs;
    if (!isOurs) await fs.rename(partial, `${partial}.old`).catch(() => void 0);
    if (!isOurs) await fs.rm(`${partial}.journal`, { force: true });
    const found = await Promise.all([`${partial}.old`, dest].map((file) => openTar(file).catch(() => void 0)));
    const atHand = found.filter((tar) => tar !== void 0);
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
      await fillPlaces(session, transfer, partial, plan.id, { open: async () => handle, finish: async () => void 0 });
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
async function replaceFile(file, bytes) {
  await fs.writeFile(`${file}.partial`, bytes, { flush: true });
  await fs.rename(`${file}.partial`, file);
}
async function pullToFolder(session, jobs, folder, nameOf, observe) {
  const base = path.join(folder, ".imgpull.partial");
  const unlock = await acquireLock(`${base}.lock`, folder);
  const handles = /* @__PURE__ */ new Map();
  const fileOf = ({ descriptor }) => path.join(folder, nameOf(descriptor.digest));
  const open2 = (job) => {
    const handle = handles.get(job) ?? openForUpdate(`${fileOf(job)}.partial`);
    handles.set(job, handle);
    return handle;
  };
  const finish = async (job) => {
    const handle = await open2(job);
    await handle.truncate(job.descriptor.size);
    await syncQuietly(handle);
    handles.delete(job);
    await handle.close();
    await fs.rename(`${fileOf(job)}.partial`, fileOf(job));
  };
  const isMissing = async (job) => {
    const handle = await fs.open(fileOf(job), "r").catch(() => void 0);
    const hasSize = (await handle?.stat())?.size === job.descriptor.size;
    const isThere = handle && hasSize && await isIntact({ handle, offset: 0 }, job.descriptor);
    await handle?.close();
    return isThere !== true;
  };
  try {
    const missing = [];
    for (const job of jobs) if (await isMissing(job)) missing.push(job);
    const transfer = newTransfer(session, missing, observe);
    await checkFreeSpace(folder, folder, transfer.totalBytes);
    await fillPlaces(session, transfer, base, "folder", { open: open2, finish });
    transfer.reusedBytes += sumOf(jobs, ({ descriptor }) => descriptor.size) - transfer.totalBytes;
    await fs.rm(`${base}.journal`, { force: true });
    return transfer;
  } finally {
    for (const handle of handles.values()) await (await handle).close();
    await unlock();
  }
}
async function pullToLayout(session, plan, folder, tars, observe) {
  const files = new Map(plan.entries.map(({ name, bytes }) => [name, bytes]));
  for (const name of files.keys()) await fs.mkdir(path.dirname(path.join(folder, name)), { recursive: true });
  const old = parseJson(await readOptional(path.join(folder, "index.json")) ?? "{}");
  if (!isRecord(old)) return fail("DISK", `${folder} holds an index.json that is not a JSON object`);
  const transfer = await pullToFolder(session, newJobs(plan, tars, true), folder, blobPath, observe);
  const ours = parseJson(files.get("index.json") ?? "");
  const nameOf = ({ annotations }) => annotations?.["org.opencontainers.image.ref.name"];
  const isOurs = (entry) => ours.manifests.some((other) => nameOf(other) === nameOf(entry));
  const others = (Array.isArray(old.manifests) ? old.manifests : []).filter((entry) => !isOurs(entry));
  for (const name of ["manifest.json", "index.json"]) files.delete(name);
  files.set("index.json", encodeJson({ ...old, ...ours, manifests: [...others, ...ours.manifests] }));
  for (const [name, bytes] of files) if (bytes) await replaceFile(path.join(folder, name), bytes);
  await syncFolder(folder);
  return transfer;
}
async function pullToStream(outer, plan, output, tars, observe) {
  const stop = new AbortController();
  const session = { ...outer, signal: AbortSignal.any([outer.signal, stop.signal]) };
  const transfer = newTransfer(session, newJobs(plan, tars), observe);
  const early = /* @__PURE__ */ new Map();
  const waiting = [];
  const wake = () => waiting.splice(0).forEach((resume) => resume());
  const until = async (isReady) => {
    while (!isReady()) {
      if (session.signal.aborted) fail("ABORTED", "stopped");
      await new Promise((resolve) => waiting.push(resolve));
    }
  };
  let cursor = 0;
  async function* inOrder() {
    for (const { lead, bytes, offset, sizeBytes } of [...plan.entries, { lead: plan.trailer, offset: plan.sizeBytes, sizeBytes: 0 }]) {
      yield lead;
      if (bytes) yield bytes;
      const job = bytes ? void 0 : transfer.jobs.find((each) => each.offset === offset);
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
  const sink = {
    isSplitting: false,
    unitBytes: ({ registry: { acceptsRanges, latencyMs }, origins }) => acceptsRanges && latencyMs >= LIMITS.farLatencyMs && origins.length === 0 ? LIMITS.streamUnitBytes : NEVER,
    accept: () => void 0,
    write: async ({ offset }, position, chunks) => {
      await until(() => offset + position < cursor + LIMITS.streamWindowBytes);
      early.set(offset + position, chunks);
      wake();
    },
    segmentDone: () => void 0,
    blobDone: async () => true
  };
  session.signal.addEventListener("abort", wake);
  for (const { origins, descriptor } of transfer.jobs) {
    while (origins[0] && !await isIntact(origins[0], descriptor)) origins.shift();
  }
  const source = Readable.from(inOrder(), { objectMode: true, highWaterMark: 1 });
  const stopAll = (error) => stop.abort(error);
  const emitting = pipeline(source, output, { end: false }).catch(stopAll);
  await fetchBlobs(session, transfer, sink).catch(stopAll);
  if (stop.signal.aborted) source.destroy();
  await emitting;
  if (outer.signal.aborted) fail("ABORTED", "stopped");
  if (stop.signal.aborted) throw stop.signal.reason;
  return transfer;
}
function fetchConfig(session, registry, descriptor) {
  const { digest, size } = descriptor;
  return withRetries(session, async () => {
    const { body, url } = await registry.blob(descriptor, 0, size, session.signal);
    const bytes = await readBody(body, LIMITS.configBytes, `the config ${digest}`);
    if (digestOf(bytes, digest) === digest && bytes.length === size) return bytes;
    return fail("DIGEST_MISMATCH", `${redactUrl(url)}: the config's bytes have another digest`);
  });
}
async function resolveImage(session, reference, name, isAll) {
  const image = await resolveAs(session, reference, isAll);
  return { ...image, name: name.replace(/@.*$/, `@${image.top.digest}`) };
}
async function resolveAs(session, reference, isAll) {
  const where = formatReference(reference);
  const registry = registryOf(session, reference);
  const { wanted, concurrency } = session.settings;
  const top = await registry.manifest(reference.digest ?? reference.tag);
  const parsed = parseManifest(top, where);
  const common = { reference, registry };
  const fetchChild = async ({ digest, size }) => {
    const child = await registry.manifest(digest);
    const wrong = `${where}: ${digest} has ${child.bytes.length} bytes, not ${size}`;
    return child.bytes.length === size ? child : fail("SIZE_MISMATCH", wrong);
  };
  const checkDepth = (depth) => depth <= LIMITS.indexDepth || fail("TOO_LARGE", `${where}: indexes inside indexes, more than ${LIMITS.indexDepth} deep`);
  const isNested = ({ mediaType }) => INDEX_TYPES.includes(mediaType);
  const isAttestation = ({ platform }) => platform?.os === "unknown" || platform?.architecture === "unknown";
  if (isAll) {
    const manifests = /* @__PURE__ */ new Map([[top.digest, top]]);
    const contents2 = [];
    const collect = async (manifest2, platform, depth) => {
      checkDepth(depth);
      if (manifest2.kind === "image") return void contents2.push({ manifest: manifest2, ...given({ platform }) });
      const entries = manifest2.manifests.filter(({ digest }) => !manifests.has(digest));
      const children = await mapConcurrently(entries, concurrency, fetchChild);
      for (const [at, child] of children.entries()) {
        if (manifests.has(child.digest)) continue;
        manifests.set(child.digest, child);
        await collect(parseManifest(child, where), entries[at]?.platform, depth + 1);
      }
    };
    await collect(parsed, void 0, 0);
    const ordered = [...contents2.filter((content) => !isAttestation(content)), ...contents2.filter(isAttestation)];
    return { ...common, top, manifests: [...manifests.values()], contents: ordered, platform: "all" };
  }
  if (parsed.kind === "image") {
    const isConfig = CONFIG_TYPES.includes(parsed.config.mediaType);
    const configBytes = isConfig ? await fetchConfig(session, registry, parsed.config) : void 0;
    const config = configBytes && parseJson(configBytes);
    const platform = isRecord(config) && config.os ? parsePlatform(config) : void 0;
    if (platform) checkPlatform(session, where, platform);
    const contents2 = [{ manifest: parsed, ...given({ platform, configBytes }) }];
    return { ...common, top, manifests: [top], contents: contents2, platform: formatPlatform(platform) };
  }
  const seen = /* @__PURE__ */ new Set();
  const search = async (index, platform, depth) => {
    checkDepth(depth);
    const usable = index.manifests.filter((entry2) => !isAttestation(entry2));
    const plain = usable.filter((entry2) => !isNested(entry2));
    for (const entry2 of plain) if (entry2.platform) seen.add(formatPlatform(entry2.platform));
    const only = usable.length === 1 && !plain[0]?.platform ? plain[0] : void 0;
    const found2 = matchPlatform(plain, platform) ?? only;
    if (found2) return [found2, await fetchChild(found2)];
    for (const entry2 of usable.filter(isNested)) {
      if (entry2.platform?.os && !matchPlatform([entry2], platform)) continue;
      const nested = parseManifest(await fetchChild(entry2), where);
      const inside = nested.kind === "index" ? await search(nested, platform, depth + 1) : void 0;
      if (inside) return inside;
    }
    return void 0;
  };
  const host = wantedPlatform(wanted);
  let found = await search(parsed, host, 1);
  if (!found && wanted.os === void 0 && host.os !== "linux") {
    found = await search(parsed, { ...host, os: "linux" }, 1);
    if (found) session.warn(`${where} has nothing for ${host.os}: taking linux`);
  }
  const choices = printable([...seen].join(", ") || "none", 1e3);
  const [entry, fetched] = found ?? fail("NO_PLATFORM", `${where} has no image for ${formatPlatform(host)}
  it has: ${choices} (--platform)`);
  const manifest = parseManifest(fetched, where);
  if (manifest.kind !== "image") return fail("PROTOCOL", `${where}: the entry for ${formatPlatform(host)} is an index`);
  const contents = [{ manifest, ...given({ platform: entry.platform }) }];
  return { ...common, top: fetched, manifests: [fetched], contents, platform: formatPlatform(entry.platform) };
}
function checkPlatform({ settings: { wanted }, warn }, where, platform) {
  const asked = { ...platform, ...wanted };
  const isSame = ({ os: system, architecture }) => system === platform.os && architecture === platform.architecture;
  const isAsked = wanted.variant === void 0 ? isSame(asked) : matchPlatform([{ mediaType: "", digest: "", size: 0, platform }], asked) !== void 0;
  const what = `it is one image, for ${formatPlatform(platform)}`;
  if (!isAsked) fail("NO_PLATFORM", `${where} has no image for ${formatPlatform(asked)}
  ${what}`);
  const host = wantedPlatform(wanted);
  if (!isSame({ ...host, os: platform.os === "linux" ? "linux" : host.os })) warn(`${where}: ${what}, not for this machine`);
}
function warnOfLayers({ warn }, images) {
  const kinds = [
    [/zstd/, "has layers compressed with zstd: Docker before 23 and podman before 4 will not load it"],
    [/foreign|nondistributable/, "has foreign layers, which Docker on Linux and some registries do not take"]
  ];
  for (const { contents, name } of images) {
    const types = contents.flatMap(({ manifest }) => manifest.layers.map(({ mediaType }) => mediaType));
    for (const [kind, words] of kinds) if (types.some((type) => kind.test(type))) warn(`${name} ${words}`);
  }
}
async function pullImages(session, request, observe) {
  const { destination: given2, images: wanted, isAll, since } = request;
  const isDirectory = (file) => fs.stat(file).then((stats) => stats.isDirectory(), () => false);
  const isLayout = typeof given2 === "string" && (/[\\/]$/.test(given2) || await isDirectory(given2));
  const doing = `cannot write ${typeof given2 === "string" ? given2 : "the stream"}`;
  const isSpecial = !isLayout && typeof given2 === "string" && await fs.stat(given2).then((stats) => !stats.isFile(), () => false);
  const device = isSpecial ? await onDisk(doing, fs.open(given2, "w")) : void 0;
  const destination = device?.createWriteStream() ?? given2;
  if (typeof destination === "string" && !isLayout) {
    const folder = path.dirname(destination);
    if (!await isDirectory(folder)) fail("DISK", `${doing}: there is no directory ${folder}`);
    await onDisk(doing, fs.access(folder, fs.constants.W_OK));
  }
  const sources = [];
  try {
    for (const file of request.reuse) sources.push(await openTar(file));
    const base = since === void 0 ? void 0 : await openTar(since);
    await base?.handle.close();
    const images = await mapConcurrently(wanted, session.settings.concurrency, ({ reference, name }) => resolveImage(session, reference, name, isAll));
    const plan = planTar(images, new Set(base?.blobs.keys()));
    warnOfLayers(session, images);
    if (base) {
      const size = formatBytes(sumOf(plan.omitted, (layer) => layer.size));
      session.warn(`left out ${plan.omitted.length} layers (${size}) that ${since} holds: load that first. docker's containerd store and ctr --no-unpack take this tar without it, in silence`);
    }
    const transfer = await onDisk(
      doing,
      typeof destination !== "string" ? pullToStream(session, plan, destination, sources, observe) : isLayout ? pullToLayout(session, plan, destination, sources, observe) : pullToTar(session, plan, await fs.realpath(destination).catch(() => destination), sources, observe)
    );
    const results = images.map(({ name, top, platform, contents }) => ({
      name,
      digest: top.digest,
      platform,
      layers: sumOf(contents, ({ manifest }) => manifest.layers.length),
      sizeBytes: isLayout ? plan.blobBytes : plan.sizeBytes,
      fetchedBytes: transfer.fetchedBytes
    }));
    return { results, transfer, plan };
  } finally {
    for (const { handle } of sources) await handle.close();
    await device?.close().catch(() => void 0);
  }
}
function settingsOf(opts, environment, certsDirectory = "/etc/docker/certs.d") {
  const refuse = (reason) => fail("BAD_OPTION", reason);
  const integer = (value, name, minimum) => Number.isSafeInteger(value) && value >= minimum ? value : refuse(`${name} must be a whole number from ${minimum} on`);
  const { scheme = "https", insecure = false, tlsCert, tlsKey, caCert, username, password, token, namespace } = opts;
  if (scheme !== "https" && scheme !== "http") refuse(`the scheme is https or http, not "${printable(String(scheme))}"`);
  if (tlsCert === void 0 !== (tlsKey === void 0)) refuse("a client certificate and its key go together (--cert, --key)");
  if (password === void 0 !== (username === void 0)) refuse("a user name and a password go together (--user, --password)");
  if (token !== void 0 && username !== void 0) refuse("--token and --user exclude each other");
  if (token !== void 0 && !/^[\x21-\x7e]+$/.test(token)) refuse("the token has characters that no header can carry");
  if (namespace !== void 0 && !isHost(namespace)) refuse(`"${printable(namespace)}" is not a registry's host name (--ns)`);
  return {
    scheme,
    insecure,
    environment,
    certsDirectory,
    timeoutMs: integer(opts.timeoutMs ?? 3e4, "the timeout", 1),
    concurrency: Math.min(64, integer(opts.concurrency ?? 8, "concurrency", 1)),
    retries: integer(opts.retries ?? 5, "retries", 0),
    wanted: given({ os: opts.osType, architecture: opts.archType, variant: opts.variant }),
    ...given({ tlsCert, tlsKey, caCert, username, password, token, namespace })
  };
}
async function withSession(opts, run, replaced = {}) {
  const { environment = process.env, certsDirectory } = replaced;
  const settings = settingsOf(opts, environment, certsDirectory);
  const transport = createTransport(settings);
  const { signal = new AbortController().signal, onWarning: warn = () => void 0 } = opts;
  try {
    if (signal.aborted) fail("ABORTED", "stopped", { cause: signal.reason });
    return await run({ settings, transport, signal, clock: systemClock, challenges: /* @__PURE__ */ new Map(), registries: /* @__PURE__ */ new Map(), warn, ...replaced });
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
  /** Leaves a verified tar at `dest`, or adds to the OCI image layout there where that is a directory or ends in "/". */
  pullTar(dest) {
    const { namespace, onProgress } = this.#opts;
    const images = [{ reference: this.#reference, name: formatReference(imageName(this.#reference, namespace)) }];
    return withSession(this.#opts, async (session) => {
      const report = progressReporter(onProgress);
      const { results, transfer } = await pullImages(session, { images, destination: dest, isAll: false, reuse: [] }, report);
      report(transfer, void 0, "finish");
      return results[0];
    });
  }
  /** The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no index for it. */
  pullManifest(type) {
    return withSession(this.#opts, async (session) => {
      if (type === "image") return this.#holder((await resolveImage(session, this.#reference, "", false)).top);
      if (type !== "list") fail("BAD_OPTION", `a manifest is "list" or "image", not "${printable(String(type))}"`);
      const fetched = await this.#fetch(session);
      if (parseManifest(fetched, this.#opts.url).kind === "index") return this.#holder(fetched);
      return fail("NOT_FOUND", `${formatReference(this.#reference)} has no list of manifests: it is one image (--manifest image)`);
    });
  }
  /** Whatever the registry has under the reference: an index or an image manifest. */
  getManifest() {
    return withSession(this.#opts, async (session) => {
      const fetched = await this.#fetch(session);
      parseManifest(fetched, this.#opts.url);
      return this.#holder(fetched);
    });
  }
  /** The manifest's descriptor by a HEAD request; by its bytes where the registry leaves something out. */
  headManifest() {
    return withSession(this.#opts, async (session) => {
      const { digest: wanted, tag } = this.#reference;
      const head = await new Registry(session, this.#reference).head(wanted ?? tag);
      if (head && (wanted ?? head.digest) === head.digest) return head;
      const { mediaType, digest, bytes } = await this.#fetch(session);
      return { mediaType, digest, size: bytes.length };
    });
  }
  /** Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept. */
  async pullBlobs(holder, dir) {
    const manifest = parseManifest({ ...holder, bytes: Buffer.from(holder.bytes) }, holder.imageUrl);
    if (manifest.kind !== "image") return fail("NOT_AN_IMAGE", `${holder.imageUrl}: a list of manifests has no blobs of its own`);
    const blobs = new Map([manifest.config, ...manifest.layers].map((descriptor) => [descriptor.digest, descriptor]));
    await withSession(this.#opts, async (session) => {
      const registry = new Registry(session, this.#reference);
      const jobs = [...blobs.values()].map((descriptor) => newJob(descriptor, registry, 0, []));
      const report = progressReporter(this.#opts.onProgress);
      await onDisk(`cannot write ${dir}`, fs.mkdir(dir, { recursive: true }));
      const transfer = await onDisk(`cannot write ${dir}`, pullToFolder(session, jobs, dir, hexOf, report));
      report(transfer, void 0, "finish");
    });
  }
  #fetch(session) {
    const { digest, tag } = this.#reference;
    return new Registry(session, this.#reference).manifest(digest ?? tag);
  }
  #holder({ mediaType, digest, bytes }) {
    return { mediaType, digest, bytes, manifest: parseJson(bytes), imageUrl: this.#opts.url };
  }
};
function progressReporter(onProgress) {
  let highest = 0;
  onProgress?.({ phase: "resolve", doneBytes: 0, totalBytes: 0, blobsDone: 0, blobsTotal: 0 });
  return ({ jobs, totalBytes }, _finished, phase = "fetch") => {
    highest = Math.max(highest, Math.min(totalBytes, sumOf(jobs, (job) => job.doneBytes)));
    const doneBytes = phase === "finish" ? totalBytes : highest;
    onProgress?.({ phase, doneBytes, totalBytes, blobsDone: jobs.filter((job) => job.isDone).length, blobsTotal: jobs.length });
  };
}
async function readEntry({ handle, entries }, name, where) {
  const entry = entries.get(name);
  if (!entry) return void 0;
  if (entry.sizeBytes > LIMITS.tarMetadataBytes) fail("BAD_TAR", `${where}: ${name} is too large`);
  return parseJson(await readAt(handle, entry.offset, entry.sizeBytes)) ?? fail("BAD_TAR", `${where}: ${name} is not JSON`);
}
async function findImages(tar, file, missing) {
  const images = [];
  const visit = async (entry, name, depth) => {
    const json = await readEntry(tar, blobPath(entry.digest), file);
    if (json === void 0) return void missing.add(blobPath(entry.digest));
    const manifest = parseManifest({ mediaType: entry.mediaType, digest: entry.digest, bytes: encodeJson(json) }, file);
    if (manifest.kind === "index") {
      if (depth < LIMITS.indexDepth) for (const child of manifest.manifests) await visit(child, name, depth + 1);
      return;
    }
    const config = CONFIG_TYPES.includes(manifest.config.mediaType) ? blobPath(manifest.config.digest) : "";
    for (const { digest } of [manifest.config, ...manifest.layers]) if (!tar.entries.has(blobPath(digest))) missing.add(blobPath(digest));
    const layers = manifest.layers.map(({ digest, mediaType, size }) => ({ entry: blobPath(digest), mediaType, size }));
    const platform = config === "" ? entry.platform : parsePlatform(await readEntry(tar, config, file) ?? {});
    images.push({ name, digest: entry.digest, platform: formatPlatform(platform), config, layers });
  };
  const index = await readEntry(tar, "index.json", file);
  const docker = await readEntry(tar, "manifest.json", file);
  if (isRecord(index) && Array.isArray(index.manifests)) {
    for (const value of index.manifests) {
      const { annotations } = value;
      const name = annotations?.["io.containerd.image.name"] ?? annotations?.["org.opencontainers.image.ref.name"] ?? "";
      await visit(parseDescriptor(value, file), printable(name), 1);
    }
  } else if (Array.isArray(docker)) {
    for (const { Config: config = "", RepoTags: tags, Layers: names = [] } of docker) {
      const platform = parsePlatform(await readEntry(tar, config, file) ?? {});
      for (const entry of [config, ...names]) if (!tar.entries.has(entry)) missing.add(printable(entry));
      const layers = names.map((entry) => ({ entry, mediaType: "", ...given({ size: tar.entries.get(entry)?.sizeBytes }) }));
      images.push({ name: (tags ?? []).map((tag) => printable(tag)).join(" "), digest: "", platform: formatPlatform(platform), config, layers });
    }
  } else {
    fail("BAD_TAR", `${file} holds no image: neither an index.json nor a manifest.json`);
  }
  return images;
}
async function listTar(io, file) {
  const tar = await openTar(file);
  try {
    for (const { name, digest, platform, layers } of await findImages(tar, file, /* @__PURE__ */ new Set())) {
      const rows = layers.map(({ entry, size = 0 }) => ({ digest: digestInName(entry) ?? entry, size, present: tar.entries.has(entry) }));
      const row = { name, digest, platform, sizeBytes: sumOf(rows, ({ size }) => size), layers: rows };
      const table = [
        `${name || "(no name)"}  ${platform}  ${formatBytes(row.sizeBytes)}`,
        ...digest ? [`  ${digest}`] : [],
        ...rows.map((layer) => `  ${formatBytes(layer.size).padStart(8)}  ${layer.digest}${layer.present ? "" : "  not here"}`)
      ];
      io.stdout.write(io.stdout.isTTY ? `${table.join("\n")}
` : `${JSON.stringify(row)}
`);
    }
  } finally {
    await tar.handle.close();
  }
}
async function diffIdOf({ handle }, { offset, sizeBytes }) {
  const magic = (await readAt(handle, offset, 4)).toString("hex");
  const { createZstdDecompress } = zlib;
  const isZstd = magic === "28b52ffd";
  if (isZstd && !createZstdDecompress) return void 0;
  const hash = createHash("sha256");
  if (sizeBytes === 0) return `sha256:${hash.digest("hex")}`;
  const stream = handle.createReadStream({ start: offset, end: offset + sizeBytes - 1, autoClose: false, highWaterMark: MIB });
  const unpack = magic.startsWith("1f8b") ? zlib.createGunzip() : isZstd ? createZstdDecompress?.() : void 0;
  const sink = new Writable({ write: (chunk, _encoding, callback) => (hash.update(chunk), callback()) });
  await (unpack ? pipeline(stream, unpack, sink) : pipeline(stream, sink));
  return `sha256:${hash.digest("hex")}`;
}
async function verifyTar(io, file) {
  const tar = await openTar(file);
  try {
    const problems = [];
    for (const [digest, { name, offset, sizeBytes }] of tar.blobs) {
      const descriptor = { mediaType: "", digest, size: sizeBytes };
      const isNamedByContent = name.startsWith("blobs/") || name.endsWith(".json") || name.endsWith(".gz");
      if (isNamedByContent && !await isIntact({ handle: tar.handle, offset }, descriptor)) problems.push(`${digest} is damaged`);
    }
    const missing = /* @__PURE__ */ new Set();
    const images = problems.length > 0 ? [] : await findImages(tar, file, missing);
    let unpacked = 0;
    for (const { config, layers, name } of images) {
      const json = await readEntry(tar, config, file);
      const { diff_ids: ids } = isRecord(json) && isRecord(json.rootfs) ? json.rootfs : {};
      for (const [at, { entry }] of layers.entries()) {
        const link = tar.entries.get(entry);
        const target = link?.type === "2" ? tar.entries.get(path.posix.join(path.posix.dirname(entry), link.linkName)) : link;
        if (!target || !ids) continue;
        const diffId = await diffIdOf(tar, target).catch(() => "what cannot be unpacked");
        if (diffId !== void 0) unpacked += 1;
        if (diffId !== void 0 && diffId !== ids[at]) problems.push(`${entry} of ${name} is ${diffId}, its config says ${ids[at]}`);
      }
    }
    for (const name of missing) problems.push(`${name} is missing${name.startsWith("blobs/") ? " (a --since tar needs its base)" : ""}`);
    if (problems.length > 0) fail("BAD_TAR", `${file}: ${problems.join(`
imgpull: ${file}: `)}`);
    const types = images.flatMap(({ layers }) => layers.map(({ mediaType }) => mediaType));
    const oldDocker = types.some((type) => type.includes("zstd")) ? "docker from 23 on" : "docker";
    const loaders = [
      ...tar.entries.has("manifest.json") ? [oldDocker, "podman", "skopeo docker-archive:"] : [],
      ...tar.entries.has("oci-layout") ? ["ctr", "skopeo oci-archive:"] : []
    ];
    io.stdout.write(`${file}: ${images.length} images, ${tar.blobs.size} blobs hashed, ${unpacked} layers unpacked: all is right
`);
    io.stdout.write(`loads in ${loaders.join(", ")}
`);
  } finally {
    await tar.handle.close();
  }
}
var OPTION_GROUPS = [
  ["What to pull", [
    { name: "os", short: "o", value: "OS", help: "operating system wanted; default: this machine's" },
    { name: "arch", short: "a", value: "ARCH", help: "processor wanted (amd64, arm64, arm ...)" },
    { name: "variant", value: "V", help: "processor variant wanted (v7, v8 ...)" },
    { name: "platform", value: "OS/ARCH[/V]", help: "the three in one word; all takes every platform" },
    { name: "from", value: "FILE", help: "read more IMAGEs, one a line; - is stdin" },
    { name: "name", value: "NAME", help: "the name that the image gets in the tar" },
    { name: "reuse", value: "TAR", isRepeatable: true, help: "take blobs from a tar that exists (repeatable)" },
    { name: "since", value: "TAR", help: "leave out layers that this tar holds" }
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
var usage = (reason) => fail("BAD_OPTION", `${reason} (imgpull --help)`);
var likeness = (left, right) => [...`^${left}`].filter((letter, at) => `^${right}$`.includes(letter + (left[at] ?? "$"))).length;
function parseCommandLine(argv) {
  const options = Object.fromEntries([...OPTIONS, { name: "ca", value: "FILE" }].map(({ name, short, value }) => [name, { type: value ? "string" : "boolean", ...given({ short }) }]));
  const { tokens } = parseArgs({ args: [...argv], options, strict: false, allowPositionals: true, tokens: true });
  const values = {};
  const switches = /* @__PURE__ */ new Set();
  const [reuse, positionals] = [[], []];
  for (const token of tokens) {
    if (token.kind === "positional") positionals.push(token.value);
    if (token.kind !== "option") continue;
    const { rawName, inlineValue } = token;
    const name = token.name === "ca" ? "cacert" : token.name;
    const spec = OPTIONS.find((option) => option.name === name);
    if (!spec) {
      const [nearest] = OPTIONS.map((option) => ({ ...option, like: likeness(name, option.name) })).filter(({ like }) => like >= 0.4 * (name.length + 1)).sort((left, right) => right.like - left.like);
      return usage(`unknown option ${printable(rawName, 60)}${nearest ? `: did you mean --${nearest.name}?` : ""}`);
    }
    if (values[name] !== void 0 || switches.has(name)) usage(`--${name} is given twice`);
    const value = rawName.startsWith("--") || !inlineValue ? token.value : token.value?.replace(/^=/, "");
    if (!spec.value) {
      if (value !== void 0) usage(`${rawName} takes no value`);
      switches.add(name);
    } else if (!value || !inlineValue && value.startsWith("-") && value !== "-") {
      usage(`${rawName} needs a value (${spec.value})`);
    } else if (spec.isRepeatable) {
      reuse.push(value);
    } else {
      values[name] = value;
    }
  }
  return { values, switches, reuse, positionals };
}
function planCommand({ values, switches, reuse, positionals }) {
  const { platform, user: username, password, token, cert: tlsCert, key: tlsKey, cacert: caCert, ns: namespace, from, name, since } = values;
  const isAll = platform === "all";
  const isPasswordOnStdin = switches.has("password-stdin");
  if (platform !== void 0 && (values.os ?? values.arch ?? values.variant) !== void 0) usage("--platform excludes --os, --arch and --variant");
  if (platform !== void 0 && !isAll && !/^[^/]+\/[^/]+(\/[^/]+)?$/.test(platform)) {
    usage(`--platform is OS/ARCH, OS/ARCH/VARIANT or all, not "${printable(platform)}"`);
  }
  const [osType, archType, variant] = platform === void 0 || isAll ? [values.os, values.arch, values.variant] : platform.split("/");
  const choice = (option, choices) => {
    const value = values[option];
    return value === void 0 ? void 0 : choices.find((each) => each === value) ?? usage(`--${option} is ${choices.join(" or ")}, not "${printable(value)}"`);
  };
  const number = (option, minimum, maximum, pattern = /^\d+$/) => {
    const value = values[option];
    if (value === void 0 || pattern.test(value) && Number(value) >= minimum && Number(value) <= maximum) return value && Number(value);
    return usage(`--${option} is a ${pattern.test("0.5") ? "" : "whole "}number from ${minimum} to ${maximum}, not "${printable(value)}"`);
  };
  if (username !== void 0 && password === void 0 && !isPasswordOnStdin) usage("--user needs --password or --password-stdin");
  if (password !== void 0 && isPasswordOnStdin) usage("--password and --password-stdin exclude each other");
  if (isPasswordOnStdin && username === void 0) usage("--password-stdin needs --user");
  if (isPasswordOnStdin && from === "-") usage("stdin is asked for twice: --password-stdin and --from -");
  const timeout = number("timeout", 1e-3, 86400, /^\d+(\.\d+)?$/);
  const opts = given({
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
    concurrency: number("concurrency", 1, 64) || void 0,
    retries: number("retries", 0, 100),
    timeoutMs: timeout ? Math.ceil(timeout * 1e3) : void 0
  });
  settingsOf({ url: "", ...opts, ...isPasswordOnStdin ? { password: "" } : {} }, {});
  const manifest = choice("manifest", ["list", "image"]);
  const isLooking = values["list-tar"] !== void 0 || values.verify !== void 0;
  const hasDestination = manifest === void 0 && positionals.length > (from === void 0 ? 1 : 0);
  const destination = hasDestination ? positionals.at(-1) : void 0;
  const images = manifest === void 0 ? positionals.slice(0, hasDestination ? -1 : void 0) : positionals.slice(0, 1);
  if (isLooking && positionals.length > 0) usage("--list-tar and --verify take no IMAGE");
  if (!isLooking && images.length === 0 && from === void 0) usage("IMAGE is missing");
  if (!isLooking && manifest === void 0 && from !== void 0 && destination === void 0) usage("DEST is missing");
  if (name !== void 0 && (images.length !== 1 || from !== void 0)) usage("--name goes with one IMAGE");
  const bound = OPTIONS.find((option) => option.isForOneHost && values[option.name] !== void 0)?.name;
  return { opts, images, destination, manifest, from, name, since, reuse, isAll, isPasswordOnStdin, isQuiet: switches.has("quiet"), bound };
}
function checkDestinationName(destination) {
  if (/[\\/]|\.(tar|oci|img|tgz|zip|gz)$/i.test(destination) || !/[:@]/.test(destination)) return;
  try {
    parseReference(destination);
  } catch {
    return;
  }
  usage(`DEST is missing: "${destination}" reads as an IMAGE; say ./${destination} to mean a file`);
}
async function readStdin({ stdin }) {
  const chunks = [];
  for await (const chunk of stdin) chunks.push(Buffer.from(chunk));
  return Buffer.concat(chunks).toString("utf8");
}
function showProgress({ stderr, environment }, isQuiet) {
  const isLive = stderr.isTTY === true && !isQuiet && environment.TERM !== "dumb";
  const dim = (text) => environment.NO_COLOR ? text : `\x1B[2m${text}\x1B[22m`;
  const startedAtMs = performance.now();
  const seconds = () => (performance.now() - startedAtMs) / 1e3;
  let latest;
  let drawnLines = 0;
  const clear = () => {
    if (drawnLines > 0) stderr.write(`\x1B[${drawnLines}A\r\x1B[J`);
    drawnLines = 0;
  };
  const total = ({ jobs, totalBytes, fetchedBytes }) => {
    const doneBytes = sumOf(jobs, (job) => job.doneBytes);
    const rate = fetchedBytes / Math.max(1e-3, seconds());
    const left = rate > 0 ? `, ${Math.ceil((totalBytes - doneBytes) / rate)} s left` : "";
    return `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${formatBytes(rate)}/s${left}`;
  };
  const bar = ({ descriptor: { digest, size }, doneBytes }, width) => {
    const label = `${hexOf(digest).slice(0, 12)} ${formatBytes(doneBytes)}/${formatBytes(size)} `;
    const room = Math.min(30, width - label.length - 2);
    const filled = Math.round(Math.max(0, room) * doneBytes / Math.max(1, size));
    return room < 5 ? label : `${label}[${"#".repeat(filled)}${" ".repeat(room - filled)}]`;
  };
  const draw = () => {
    if (!latest) return;
    if (!isLive) return void stderr.write(`imgpull: ${total(latest)}
`);
    const width = Math.max(20, (stderr.columns ?? 80) - 1);
    const moving = [...new Set([...latest.active].map(({ job }) => job))].slice(0, 12);
    const lines = [...moving.map((job) => dim(bar(job, width).slice(0, width))), total(latest).slice(0, width)];
    clear();
    stderr.write(lines.map((line) => `${line}
`).join(""));
    drawnLines = lines.length;
  };
  const timer = isQuiet ? void 0 : setInterval(draw, isLive ? 100 : 1e4).unref();
  return {
    seconds,
    observe: (transfer, finished) => {
      latest = transfer;
      if (!finished || isQuiet || isLive) return;
      stderr.write(`imgpull: ${finished.descriptor.digest.slice(0, 19)} ${formatBytes(finished.descriptor.size)} done
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
    }
  };
}
async function listImages(io, command) {
  const { from, name: givenName, bound, opts: { namespace } } = command;
  const list = from === void 0 ? "" : from === "-" ? await readStdin(io) : await fs.readFile(from, "utf8").catch((error) => usage(`cannot read --from ${from}: ${diskWords(error)}`));
  const lines = list.split(/\r?\n/).map((line) => line.replace(/(^|\s)#.*$/, "").trim()).filter(Boolean);
  const texts = [...command.images, ...lines];
  if (texts.length === 0) usage("no IMAGE is given");
  const references = await mapConcurrently(texts, 1, async (text) => parseReference(text));
  const hosts = [...new Set(references.map(({ host }) => host))];
  if (hosts.length > 1 && bound) usage(`--${bound} belongs to one registry, and the IMAGEs are on ${hosts.join(", ")}`);
  const unique = new Map(references.map((reference) => [formatReference(reference), reference]));
  const images = [...unique.values()].map((reference) => {
    const named = givenName === void 0 ? imageName(reference, namespace) : parseReference(givenName);
    return { reference, name: formatReference(named) };
  });
  const names = images.map(({ name }) => name);
  const doubled = names.find((name, at) => names.indexOf(name) !== at);
  if (doubled !== void 0) usage(`two IMAGEs would have the name ${doubled} in the tar`);
  return images;
}
async function runCommand(argv, io, signal) {
  const { stdout, stderr, environment } = io;
  const line = parseCommandLine(argv);
  if (line.switches.has("help")) return void stdout.write(helpText());
  if (line.switches.has("version")) return void stdout.write(`imgpull version: ${"1.0.0"} build date: ${"2026-11-23T00:00:00Z"}
`);
  const { opts, bound: _bound, ...rest } = planCommand(line);
  const command = { opts, bound: _bound, ...rest };
  const { isAll, reuse, since, isQuiet } = command;
  if (line.switches.has("parsed")) {
    const secrets = OPTIONS.filter(({ name, isSecret }) => isSecret && name in opts).map(({ name }) => [name, "***"]);
    return void stdout.write(`${JSON.stringify({ ...rest, ...opts, ...Object.fromEntries(secrets) }, null, 2)}
`);
  }
  if (line.values["list-tar"] !== void 0) return listTar(io, line.values["list-tar"]);
  if (line.values.verify !== void 0) return verifyTar(io, line.values.verify);
  const images = await listImages(io, command);
  const { reference } = images[0];
  const destination = command.destination ?? defaultDestination(reference);
  if (command.destination !== void 0) checkDestinationName(destination);
  const [there, own] = await Promise.all([destination, "/dev/stdout"].map((name) => fs.stat(name).catch(() => void 0)));
  const isStream = destination === "-" || there !== void 0 && !there.isFile() && there.ino === own?.ino && there.dev === own.dev;
  if (isStream && stdout.isTTY) usage("the tar is not written to a terminal: redirect stdout");
  const password = command.isPasswordOnStdin ? { password: (await readStdin(io)).replace(/\r?\n$/, "") } : {};
  const progress = showProgress(io, isQuiet);
  const pullerOpts = { ...opts, ...password, url: formatReference(reference), signal, onWarning: progress.say };
  try {
    if (command.manifest !== void 0) {
      const { bytes, digest, manifest } = await new Puller(pullerOpts).pullManifest(command.manifest);
      stdout.write(stdout.isTTY ? `${JSON.stringify(manifest, null, 2)}
` : bytes);
      return void stderr.write(`${digest}
`);
    }
    const request = { images, destination: isStream ? stdout : destination, isAll, reuse, ...given({ since }) };
    const pull = (session) => pullImages(session, request, progress.observe);
    const { results, transfer, plan } = await withSession(pullerOpts, pull, { environment });
    progress.stop();
    const pinned = images.map((image, at) => formatReference({ ...image.reference, digest: results[at]?.digest }));
    if (!isStream) stdout.write(pinned.map((each) => `${each}
`).join(""));
    if (isQuiet) return;
    const counts = [[transfer.fetchedBytes, "fetched"], [transfer.reusedBytes, "reused"], [transfer.resumedBytes, "resumed"]];
    const parts = counts.filter(([bytes], at) => at === 0 || bytes > 0).map(([bytes, how]) => `${formatBytes(bytes)} ${how}`);
    const what = `${images.length === 1 ? "1 image" : `${images.length} images`}, ${formatBytes(plan.sizeBytes)}`;
    progress.say(`${what} in ${isStream ? "the stream" : destination}: ${parts.join(", ")}, ${progress.seconds().toFixed(1)} s`);
  } finally {
    progress.stop();
  }
}
async function main(argv, io) {
  const { stdin, stdout, stderr, env: environment } = process;
  const used = io ?? { stdin, stdout, stderr, environment };
  const stop = new AbortController();
  let signalCode = 0;
  const interrupt = (name) => {
    if (signalCode !== 0) process.exit(signalCode);
    signalCode = name === "SIGINT" ? 130 : 143;
    stop.abort();
  };
  if (!io) {
    process.on("SIGINT", interrupt).on("SIGTERM", interrupt);
    for (const stream of [stdout, stderr]) stream.on("error", () => void 0);
  }
  try {
    await runCommand(argv, used, stop.signal);
    return 0;
  } catch (error) {
    if (signalCode !== 0) return signalCode;
    if (!(error instanceof ImgpullError)) throw error;
    if (errorCodeOf(error.cause) !== "EPIPE") used.stderr.write(`imgpull: ${error.message}
`);
    return error.code === "BAD_REFERENCE" || error.code === "BAD_OPTION" ? 2 : 1;
  } finally {
    if (!io) process.off("SIGINT", interrupt).off("SIGTERM", interrupt);
  }
}
var internals = Object.freeze({
  LIMITS,
  OPTIONS,
  acceptableVariants,
  addRange,
  apiHost,
  defaultDestination,
  digestInName,
  encodeTarHeader,
  findCredential,
  formatBytes,
  formatReference,
  helpText,
  hostPlatform,
  imageName,
  isExemptFromProxy,
  isRetriable,
  matchPlatform,
  missingRanges,
  normalizeAuthKey,
  parseChallenges,
  parseCommandLine,
  parseManifest,
  parseReference,
  parseRetryAfter,
  planCommand,
  planTar,
  printable,
  proxyFor,
  pullImages,
  readTar,
  redactUrl,
  resolveImage,
  retryDelayMs,
  settingsOf,
  systemCertificates,
  wantedPlatform,
  withSession
});
export {
  ImgpullError,
  Puller,
  internals,
  main,
  newPullerOpts
};
