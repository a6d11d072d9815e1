// build/script/imgpull.js
import {once, setMaxListeners} from "node:events"
import {
	appendFileSync,
	closeSync,
	constants,
	createWriteStream,
	promises as fs,
	open as openCallback,
	openSync
} from "node:fs"
import * as net from "node:net"
import * as os from "node:os"
import * as path from "node:path"
import {unescape as percentDecode} from "node:querystring"
import {addAbortSignal, Readable} from "node:stream"
import {finished, pipeline} from "node:stream/promises"
import {setTimeout as delay} from "node:timers/promises"
var load = process.getBuiltinModule
var isWindows = process.platform === "win32"
var DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
var DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
var DOCKER_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
var DOCKER_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
var OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
var OCI_INDEX = "application/vnd.oci.image.index.v1+json"
var OCI_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
var INDEX_TYPES = [OCI_INDEX, DOCKER_INDEX]
var MANIFEST_TYPES = [...INDEX_TYPES, OCI_MANIFEST, DOCKER_MANIFEST]
var CONFIG_TYPES = [DOCKER_CONFIG_TYPE, OCI_CONFIG_TYPE]
var MIB = 1024 * 1024
var NEVER = Number.POSITIVE_INFINITY
var LIMITS = Object.freeze({
	manifestBytes: 4 * MIB,
	configBytes: 16 * MIB,
	tokenBytes: MIB,
	errorBodyBytes: MIB / 16,
	keyFileBytes: MIB / 16,
	credentialFileBytes: 4 * MIB,
	tarMetadataBytes: 16 * MIB,
	tarExtensionBytes: MIB,
	paxRecords: 5e6,
	tarEntries: 2e5,
	tarFolders: 2e5,
	tarNameBytes: 4096,
	tarNamesBytes: 16 * MIB,
	tarSmallDocumentBytes: MIB / 4,
	tarDocumentBytes: 64 * MIB,
	problemLines: 1e3,
	jsonDepth: 100,
	jsonValues: 1e6,
	tarReferences: 3e5,
	unpackFactor: 1e3,
	unpackFloorBytes: 1024 * MIB,
	layerPaths: 1e6,
	layerLinkBytes: 8 * MIB,
	unpackedNameBytes: 255,
	unpackedPathBytes: 3900,
	unpackedLinkBytes: 4095,
	headerCostBytes: 2e3,
	recordCostBytes: 300,
	pieceCostBytes: 1e3,
	attributeBytes: 4e3,
	mirrorFailures: 2,
	indexDepth: 4,
	indexEntries: 1024,
	manifests: 2048,
	layers: 1e5,
	documentBytes: 80 * MIB,
	signatures: 1e3,
	bundleJsonValues: 1e4,
	referrerPages: 100,
	referrers: 1e3,
	referrerDepth: 4,
	headerBytes: MIB,
	secretLength: 4,
	signaturesKept: 64,
	helperMs: 6e4,
	diagnosisMs: 2e3,
	redirects: 10,
	redirectBodyBytes: 64 * 1024,
	headersWaitFactor: 4,
	documentWaitFactor: 4,
	leastAnswerBytes: MIB / 16,
	slowBytesPerSecond: 1024,
	tokenFloorMs: 6e4,
	firstBackoffMs: 1e3,
	backoffMs: 3e4,
	retryAfterMs: 12e4,
	absurdWaitMs: 366 * 24 * 3600 * 1e3,
	lockBeatMs: 1e4,
	lockStaleMs: 6e4,
	lockBirthMs: 200,
	lockBytes: 4096
})
var TUNING = Object.freeze({
	batchMs: 1e3,
	batchBytes: MIB / 2,
	gatherBytes: 2 * MIB,
	journalBytes: MIB / 2,
	syncBytes: 32 * MIB,
	splitBytes: MIB / 8,
	worthMs: 50,
	unitBytes: 8 * MIB,
	smallBytes: MIB / 16,
	earlyBytes: 2 * MIB,
	earlyPieceBytes: 1024,
	firstConnections: 8,
	growth: 4,
	noise: 0.1,
	fastBytesPerMs: 32e3,
	fastNoise: 0.3,
	fastMeasureMs: 500,
	fastWorthMs: 3e3,
	trialChances: 2,
	firstMeasureMs: 40,
	measureMs: 80,
	trialPauseMs: 2e3,
	worthTryingMs: 500,
	promptMs: 20,
	lateMs: 500,
	busyLoop: 0.95,
	tickMs: 20,
	addressMs: 3e3,
	readerPollMs: 50,
	readerNewsMs: 2e3,
	streamWindowBytes: 32 * MIB,
	headerReadBytes: 64 * 1024,
	unpackBytes: 256 * 1024,
	unpackLanes: 4
})
var ImgpullError = class extends Error {
	name = "ImgpullError"
	code
	constructor(code, message, details = {}) {
		const {cause, status, retryAfterMs, report} = details
		super(message, cause === void 0 ? void 0 : {cause})
		this.code = code
		if (status !== void 0) this.status = status
		if (retryAfterMs !== void 0) this.retryAfterMs = retryAfterMs
		if (report !== void 0) this.report = report
	}
}
function fail(code, message, details) {
	throw new ImgpullError(code, message, details)
}
var stopped = cause => fail("ABORTED", "stopped", {cause})
var errorCodeOf = error => String(error?.code ?? "")
var likeness = (left, right) =>
	[...`^${left}`].filter((letter, at) => `^${right}$`.includes(letter + (left[at] ?? "$"))).length
function nearestName(word, names) {
	const isLike = name => likeness(word, name) >= 0.4 * (word.length + 1)
	return names.filter(isLike).sort((left, right) => likeness(word, right) - likeness(word, left))[0]
}
var CONTROL_CHARACTERS = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g
var firstLineOf = message => message.split("\n")[0] ?? ""
var printable = (text, maximum) => unmarked(outside(text, maximum))
var OUTSIDE = /\u2068(\d+) ([^\u2069]*)\u2069/g
var outside = (text, maximum = 300) => `⁨${maximum} ${text.replace(CONTROL_CHARACTERS, " ").trim()}⁩`
function unmarked(sentence, strike = words => words) {
	return sentence.replace(OUTSIDE, (_all, maximum, words) => {
		const shown = strike(words)
		const length = Number(maximum)
		return shown.length > length ? `${shown.slice(0, length)}…` : shown
	})
}
var ForeignUrl = class extends URL {}
function redactUrl(url) {
	const {protocol, host, pathname, searchParams} = url
	const place = `${host}${pathname.replace(/(;|%3b|%3f).*$/i, "$1***")}`
	const scheme = /^https?:$/.test(protocol) ? protocol : outside(protocol)
	if (url instanceof ForeignUrl) return `${scheme}//${outside(place)}`
	const namespace = searchParams.get("ns")
	const query = namespace === null ? "" : `?ns=${namespace}`
	return printable(`${protocol}//${place}${query}`)
}
var withoutUser = text => text.replace(/^.*@(?!sha(256|512):)/s, "***@")
function base64Forms(secret) {
	const forms = [0, 1, 2].map(shift => {
		const bytes = Buffer.from(" ".repeat(shift) + secret)
		const text = bytes.toString("base64").replace(/=+$/, "")
		const isOpen = bytes.length % 3 > 0
		return text.slice(shift === 0 ? 0 : shift + 1, isOpen ? -1 : void 0)
	})
	const forUrls = forms.map(form => form.replaceAll("+", "-").replaceAll("/", "_"))
	return [...forms, ...forUrls, ...forms.map(encodeURIComponent)]
}
function formsOf(secret) {
	const text = Buffer.from(secret).toString("utf8")
	const percent = encodeURIComponent(text)
	const strict = percent.replace(/[!'()*~.-]/g, sign => `%${sign.charCodeAt(0).toString(16)}`)
	const inForms = percent.replaceAll("%20", "+")
	const percents = [percent, strict, inForms].flatMap(form => [
		form,
		form.replace(/%../g, digits => digits.toLowerCase()),
		form.replace(/%../g, digits => digits.toUpperCase())
	])
	const inJson = JSON.stringify(text).slice(1, -1)
	const inHtml = text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;")
	return [text, inJson, inHtml, ...percents, ...base64Forms(text)]
}
var DIGEST_IN_WORDS = /sha(256|512):[0-9a-f]+/g
var Secrets = class {
	#secrets = /* @__PURE__ */ new Set()
	#forms = /* @__PURE__ */ new Set()
	#signatures = []
	#patterns
	add(...secrets) {
		for (const secret of secrets) {
			if (!secret || this.#secrets.has(secret)) continue
			this.#secrets.add(secret)
			for (const form of formsOf(secret)) this.#forms.add(form)
			this.#patterns = void 0
		}
	}
	addSigned({searchParams}) {
		for (const [name, value] of searchParams)
			if (/sig|token|cred|secret|key|auth|policy/i.test(name)) this.#signatures.push(value)
		this.#signatures.splice(0, this.#signatures.length - LIMITS.signaturesKept)
		this.#patterns = void 0
	}
	strikeWords(text) {
		const struck = text.replace(this.#compile().inWords, "***")
		return struck.replace(/([?&;][\w.~%-]+=)[^\s&;"'<>)]+/g, "$1***")
	}
	strike(sentence) {
		const {inWords, anywhere} = this.#compile()
		return unmarked(sentence, words => this.strikeWords(words))
			.replace(DIGEST_IN_WORDS, digest => digest.replace(inWords, "***"))
			.replace(anywhere, "***")
	}
	strikeError(error) {
		const seen = /* @__PURE__ */ new Set()
		for (let each = error; each instanceof Error && !seen.has(each); each = each.cause) {
			seen.add(each)
			const isOurs = each instanceof ImgpullError
			const texts = each
			for (const name of ["message", "stack", "hostname", "host"]) {
				const text = texts[name]
				if (typeof text !== "string") continue
				const struck = isOurs ? this.strike(text) : this.strikeWords(text)
				if (struck !== text) texts[name] = struck
			}
		}
	}
	#compile() {
		if (this.#patterns) return this.#patterns
		const forms = /* @__PURE__ */ new Set([...this.#forms, ...this.#signatures.flatMap(formsOf)])
		const inWords = anyOf(forms, LIMITS.secretLength)
		const anywhere = anyOf(forms, 2 * LIMITS.secretLength)
		this.#patterns = {inWords, anywhere}
		return this.#patterns
	}
}
function anyOf(texts, leastLength) {
	const patterns = [...texts]
		.filter(({length}) => length >= leastLength)
		.sort((left, right) => right.length - left.length)
		.map(text => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"))
	return new RegExp(patterns.join("|") || "(?!)", "g")
}
function certificateNames({host = "", cert}) {
	const names = (cert?.subjectaltname ?? "")
		.split(", ")
		.map(name => name.replace(/^(DNS|IP Address):/, ""))
		.filter(Boolean)
	const listed = names.slice(0, 8).join(", ") + (names.length > 8 ? " …" : "")
	const named = names.length > 0 ? outside(listed) : "no name at all"
	return `its certificate is not for ${outside(host)} but for ${named}`
}
var CLIENT_CERTIFICATE_REMEDY = "it may want a client certificate, one that it knows: `tlsCert` and `tlsKey`"
var PLAIN_HTTP = /wrong version number|packet length too long|unknown protocol|record layer failure/i
var CONNECTION_FAULTS = [
	{
		pattern: PLAIN_HTTP,
		code: "TLS",
		words: "the server answers plain HTTP on this port",
		remedy: "try `scheme` http"
	},
	{
		pattern: /^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO)/,
		code: "TLS",
		remedy: "its certificate authority is not known here: `caCert` gives it, `insecure` goes without"
	},
	{
		pattern: /^ERR_TLS_CERT_ALTNAME_INVALID/,
		code: "TLS",
		words: certificateNames,
		remedy: "use a name that it is for; `insecure` goes without the check"
	},
	{
		pattern:
			/certificate required|bad certificate|handshake failure|alert (unknown ca|certificate (unknown|expired|revoked)|access denied|unsupported certificate)/i,
		code: "TLS",
		remedy: CLIENT_CERTIFICATE_REMEDY
	},
	{pattern: /^(CERT_|INVALID_|ERR_TLS|ERR_SSL|EPROTO)/, code: "TLS"},
	{
		pattern: /^HPE_(UNEXPECTED_CONTENT_LENGTH|INVALID_CONTENT_LENGTH)/,
		code: "PROTOCOL",
		words: "the answer tells its length twice, or in no number (Content-Length): refused"
	},
	{
		pattern: /^HPE_HEADER_OVERFLOW/,
		code: "PROTOCOL",
		words: `the answer's headers are larger than ${LIMITS.headerBytes} bytes`
	},
	{
		pattern: /^HPE_INVALID_HEADER_TOKEN/,
		code: "PROTOCOL",
		words: "a header line of the answer is malformed"
	},
	{
		pattern: /^HPE_(INVALID_CONSTANT|INVALID_VERSION|INVALID_STATUS)/,
		code: "PROTOCOL",
		words: "what answers there does not speak HTTP/1.1"
	},
	{pattern: /^ENOTFOUND/, code: "NETWORK", words: "no such host"},
	{
		pattern: /^EAI_AGAIN/,
		code: "NETWORK",
		words: "no name server answers",
		remedy: "is this machine connected, and its name server the right one?"
	},
	{pattern: /^ECONNRESET/, code: "NETWORK", words: "connection lost"},
	{pattern: /^ECONNREFUSED/, code: "NETWORK", words: "connection refused"}
]
var OTHER_CONNECTION_FAULT = {pattern: /^/, code: "NETWORK"}
function connectionError(error, doing) {
	if (error instanceof ImgpullError) return error
	const cause = error
	if (cause.name === "AbortError") return new ImgpullError("ABORTED", "stopped", {cause})
	const nodeCode = errorCodeOf(error)
	const nodeWords = printable(cause.message || cause.errors?.[0]?.message || nodeCode)
	const fault =
		CONNECTION_FAULTS.find(({pattern}) => pattern.test(`${nodeCode} ${nodeWords}`)) ?? OTHER_CONNECTION_FAULT
	const host = cause.hostname ?? cause.address
	const ownWords = host ? nodeWords.replaceAll(host, () => outside(host)) : nodeWords
	const {code, words = ownWords, remedy} = fault
	const said = typeof words === "string" ? words : words(cause)
	const advice =
		remedy === void 0
			? ""
			: `
  ${remedy}`
	return new ImgpullError(code, `${doing}: ${said}${advice}`, {cause})
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
	EPIPE: "who reads it has gone before its end",
	ELOOP: "it is a loop of links",
	NO_INODES: "the file system has no inodes left: it holds too many files",
	EFBIG: "the file system does not take a file of that size",
	ENAMETOOLONG: "a name in the path is too long"
}
var diskWords = error => DISK_WORDS[errorCodeOf(error)] ?? printable(error.message)
function onDisk(doing, work) {
	return work.catch(error => {
		const isRefusal2 = error.syscall !== void 0 || errorCodeOf(error) === "ERR_ACCESS_DENIED"
		if (!isRefusal2) throw error
		return fail("DISK", `${doing}: ${diskWords(error)}`, {cause: error})
	})
}
var ignore = () => void 0
var isDigest = text => typeof text === "string" && /^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/.test(text)
var algorithmOf = digest => digest.slice(0, digest.indexOf(":"))
var hexOf = digest => digest.slice(digest.indexOf(":") + 1)
var newHash = digest => load("node:crypto").createHash(algorithmOf(digest))
var digestOf = (bytes, like = "sha256:") => `${algorithmOf(like)}:${newHash(like).update(bytes).digest("hex")}`
var isRecord = value => typeof value === "object" && value !== null && !Array.isArray(value)
var isStringList = value => Array.isArray(value) && value.every(each => typeof each === "string")
var encodeJson = value => Buffer.from(JSON.stringify(value), "utf8")
function parseJson(text) {
	try {
		return JSON.parse(String(text))
	} catch {
		return void 0
	}
}
var QUOTE = 34
var COMMA = 44
var OPEN_BRACKET = 91
var BACKSLASH = 92
var CLOSE_BRACKET = 93
var OPEN_BRACE = 123
var CLOSE_BRACE = 125
function endOfString(json, start) {
	let at = start + 1
	while (at < json.length && json[at] !== QUOTE) at += json[at] === BACKSLASH ? 2 : 1
	return at
}
function parseShallowJson(json, maximumValues = LIMITS.jsonValues) {
	let depth = 0
	let values = 0
	for (let at = 0; at < json.length; at += 1) {
		const byte = json[at]
		if (byte === QUOTE) at = endOfString(json, at)
		if (byte === OPEN_BRACE || byte === OPEN_BRACKET) depth += 1
		if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) depth -= 1
		if (byte === COMMA) values += 1
		if (depth > LIMITS.jsonDepth || values > maximumValues) return void 0
	}
	return parseJson(json)
}
var dropEmpty = values =>
	Object.fromEntries(Object.entries(values).filter(([, value]) => value !== void 0 && value !== ""))
var sumOf = (items, numberOf) => {
	let sum = 0
	for (const item of items) sum += numberOf(item)
	return sum
}
function formatBytes(bytes) {
	let value = bytes
	let unit = "B"
	for (const larger of ["kB", "MB", "GB", "TB"]) {
		if (value < 999.5) break
		value /= 1e3
		unit = larger
	}
	const isWhole = unit === "B" || value >= 99.95
	return `${isWhole ? Math.round(value) : value.toFixed(1)} ${unit}`
}
var counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`
var formatPlatform = ({os: system, architecture, variant} = {}) =>
	[system, architecture, variant].filter(Boolean).join("/")
async function mapConcurrently(items, limit, run) {
	const results = []
	const queue = items.entries()
	const runLane = async () => {
		for (const [index, item] of queue) {
			const [result] = await Promise.allSettled([run(item)])
			results[index] = result
		}
	}
	await Promise.all(Array.from({length: limit}, runLane))
	return settled(results)
}
function settled(results) {
	const values = []
	const failures = []
	for (const result of results) {
		if (result.status === "fulfilled") values.push(result.value)
		else failures.push(result.reason)
	}
	if (failures.length > 0) throw asOneFailure(failures)
	return values
}
function asOneFailure(failures) {
	const errors = failures.filter(failure => failure instanceof ImgpullError)
	if (errors.length < failures.length) return failures.find(failure => !(failure instanceof ImgpullError))
	const telling = errors.filter(({code}) => code !== "ABORTED")
	const [first] = telling
	if (!first) return errors[0]
	const messages = [...new Set(telling.map(({message}) => message))]
	if (messages.length === 1) return first
	return new ImgpullError(first.code, messages.join("\n"), {status: first.status, cause: first})
}
function anySignal(...signals) {
	const signal = AbortSignal.any(signals)
	setMaxListeners(0, signal)
	return signal
}
var HUB_HOSTS = ["docker.io", "index.docker.io", "registry-1.docker.io"]
var LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
var HOST_NAME = `${LABEL}(?:\\.${LABEL})*`
var HOST = new RegExp(`^(?:${HOST_NAME}|\\[(?<ipv6>[0-9a-fA-F:.]+)\\])(?::(?<port>\\d{1,5}))?$`)
var COMPONENT = "[a-z0-9]+(?:(?:\\.|_{1,2}|-+)[a-z0-9]+)*"
var REPOSITORY = new RegExp(`^${COMPONENT}(?:/${COMPONENT})*$`)
var TAG = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/
var PARTS = /^(?:(?<host>localhost|[^/]*[.:][^/]*)\/)?(?<name>.*?)(?::(?<tag>[^:]*))?$/
function isHost(text) {
	const match = HOST.exec(text)
	if (!match) return false
	const {ipv6, port = "443"} = match.groups ?? {}
	if (Number(port) < 1 || Number(port) > 65535) return false
	if (ipv6 !== void 0 && !net.isIPv6(ipv6)) return false
	return URL.canParse(`http://${text}`)
}
function splitReference(text) {
	const [place = "", digest] = text.split("@")
	const {host = "docker.io", name = "", tag} = PARTS.exec(place)?.groups ?? {}
	const isHub = canonicalHost(host) === "docker.io"
	return {
		host: isHub ? "docker.io" : host,
		repository: isHub && !name.includes("/") ? `library/${name}` : name,
		name,
		tag,
		digest
	}
}
function faultOfReference(text) {
	if (text === "") return "it is empty"
	if (/^[a-z]+:\/\//i.test(text)) return "write it without the scheme (use `scheme` for http)"
	if (text.includes(" ")) return "it has a space, a character that no reference has"
	if (/[^\x21-\x7e]/.test(text)) return "it has a character that is not printable ASCII"
	if (text.split("@").length > 2) return "it has more than one @"
	const {host, repository, name, tag, digest} = splitReference(text)
	if (digest !== void 0 && !isDigest(digest)) {
		const form = "sha256: and 64, or sha512: and 128 lower-case hex digits"
		return `"${printable(digest)}" is not a digest: ${form}`
	}
	if (!isHost(host)) return `"${host}" is not a host, host:port or [IPv6 address]`
	if (name === "") return "the repository is missing"
	if (name !== name.toLowerCase()) return "a repository is written in lower case"
	if (!REPOSITORY.test(name)) return `"${name}" is not a repository name`
	if (tag === "") return "the tag behind the : is empty"
	if (tag !== void 0 && !TAG.test(tag)) return `"${tag}" is not a tag`
	if (`${host}/${repository}`.length > 255) return "host and repository are longer than 255 characters"
	return void 0
}
var isReference = text => faultOfReference(text) === void 0
function parseReference(text) {
	const fault = faultOfReference(text)
	if (fault !== void 0) {
		fail("BAD_REFERENCE", `bad image reference "${printable(withoutUser(text))}": ${fault}`)
	}
	const {host, repository, tag, digest} = splitReference(text)
	const defaultTag = digest === void 0 ? "latest" : void 0
	return {host, repository, ...dropEmpty({tag: tag ?? defaultTag, digest})}
}
var placeOf = ({host, repository}) => `${host}/${repository}`
function formatReference({tag, digest, ...place}) {
	const tagPart = tag === void 0 ? "" : `:${tag}`
	const digestPart = digest === void 0 ? "" : `@${digest}`
	return `${placeOf(place)}${tagPart}${digestPart}`
}
var apiHost = host => (host === "docker.io" ? "registry-1.docker.io" : host)
function imageName({host, repository, tag, digest}, namespace) {
	const version = tag === void 0 ? `@${digest}` : `:${tag}`
	if (namespace !== void 0) return parseReference(`${namespace}/${repository}${version}`)
	const [firstSegment = "", ...others] = repository.split("/")
	const isMirrored = others.length > 0 && firstSegment.includes(".") && isHost(firstSegment)
	return parseReference(`${isMirrored ? "" : `${host}/`}${repository}${version}`)
}
function defaultDestination({repository, tag, digest = ""}) {
	const name = repository.slice(repository.lastIndexOf("/") + 1)
	return `${name}-${tag ?? hexOf(digest).slice(0, 12)}.tar`
}
var canonicalHost = host => (HUB_HOSTS.includes(host.toLowerCase()) ? "docker.io" : host.toLowerCase())
function parseMirrors(mirrors, scheme) {
	const parsed = /* @__PURE__ */ new Map()
	for (const [host, places] of Object.entries(mirrors)) {
		if (!isHost(host)) fail("BAD_OPTION", `\`mirrors\`: "${printable(host)}" is not a host`)
		const key = canonicalHost(host)
		const added = places.map(place => parseMirror(place, scheme))
		parsed.set(key, [...(parsed.get(key) ?? []), ...added])
	}
	return parsed
}
function parseMirror(text, scheme) {
	const parts = /^(?:(https?):\/\/)?([^/]*)(?:\/(.*?))?\/?$/i.exec(text) ?? []
	const [, written = scheme, host = "", prefix = ""] = parts
	const isPlace = isHost(host) && (prefix === "" || REPOSITORY.test(prefix))
	if (isPlace) return {scheme: written.toLowerCase() === "http" ? "http" : "https", host, prefix}
	const shown = printable(withoutUser(text))
	return fail("BAD_OPTION", `\`mirrors\`: "${shown}" is not HOST[:PORT][/PREFIX]`)
}
var SOCKET_OPTIONS = {
	insecureHTTPParser: true,
	maxHeaderSize: LIMITS.headerBytes,
	autoSelectFamilyAttemptTimeout: TUNING.addressMs
}
var clientFor = ({protocol}) => load(protocol === "https:" ? "node:https" : "node:http")
var basicAuthorization = (username, secret) =>
	`Basic ${Buffer.from(`${username}:${secret}`, "utf8").toString("base64")}`
function parseRetryAfter(value, now) {
	if (value === void 0) return void 0
	if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1e3
	if (!/[a-z]/i.test(value)) return void 0
	const date = Date.parse(value)
	return Number.isNaN(date) ? void 0 : Math.max(0, date - now)
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
]
var CA_DIRECTORIES = ["/etc/ssl/certs", "/etc/pki/tls/certs", "/system/etc/security/cacerts"]
var readOptional = file => fs.readFile(file, "utf8").catch(ignore)
var listOptional = async folder => (await fs.readdir(folder).catch(() => [])).sort()
var certificatesOf = (text = "") =>
	text.split(/(?=-----BEGIN )/).filter(block => /^-----BEGIN (X509 |TRUSTED )?CERTIFICATE-----/.test(block))
function isReadable(certificate) {
	const {X509Certificate} = load("node:crypto")
	try {
		return new X509Certificate(certificate).serialNumber !== ""
	} catch {
		return false
	}
}
async function systemCertificates(environment) {
	const {SSL_CERT_FILE, SSL_CERT_DIR, NODE_EXTRA_CA_CERTS} = environment
	const found = /* @__PURE__ */ new Set()
	const add = (...texts) => {
		for (const each of texts.flatMap(certificatesOf)) found.add(each)
	}
	for (const file of SSL_CERT_FILE ? [SSL_CERT_FILE] : CA_BUNDLES) {
		add(await readOptional(file))
		if (found.size > 0) break
	}
	const defaultDirectories = found.size > 0 ? [] : CA_DIRECTORIES
	for (const directory of SSL_CERT_DIR?.split(path.delimiter) ?? defaultDirectories) {
		const names = await listOptional(directory)
		add(...(await Promise.all(names.map(name => readOptional(path.join(directory, name))))))
	}
	if (found.size === 0) add(...nodeCertificates())
	if (NODE_EXTRA_CA_CERTS) add(await readOptional(NODE_EXTRA_CA_CERTS))
	return [...found]
}
function nodeCertificates() {
	const {getCACertificates, rootCertificates = []} = load("node:tls")
	const isKeptByTheSystem = ["darwin", "win32"].includes(process.platform)
	const system = isKeptByTheSystem ? (getCACertificates?.("system") ?? []) : []
	return system.length > 0 ? system : rootCertificates
}
async function readPem(what, file) {
	const text = await fs
		.readFile(file, "utf8")
		.catch(error => fail("TLS", `cannot read ${what} ${file}: ${diskWords(error)}`))
	if (!text.includes("-----BEGIN ")) fail("TLS", `${what} ${file} is not a PEM file`)
	return text
}
async function readAuthorities(what, file) {
	const certificates = certificatesOf(await readPem(what, file)).filter(isReadable)
	if (certificates.length === 0) fail("TLS", `${what} ${file} has no certificate that can be read`)
	return certificates
}
async function readKey(what, file) {
	const text = await readPem(what, file)
	const isEncrypted = /-----BEGIN ENCRYPTED|^Proc-Type: 4,ENCRYPTED/m.test(text)
	if (isEncrypted)
		fail(
			"TLS",
			`${what} ${file} has a passphrase
  give it without one: openssl pkey -in FILE -out NEW`
		)
	return text
}
async function readCertsFolders(folders) {
	const files = []
	for (const folder of folders) files.push(...(await listOptional(folder)).map(name => path.join(folder, name)))
	const readAll = (suffix, read) => files.filter(file => file.endsWith(suffix)).map(file => read("certificate", file))
	const authorities = await Promise.allSettled(readAll(".crt", readAuthorities))
	const readable = authorities.filter(({status}) => status === "fulfilled")
	return {
		ca: settled(readable.length > 0 ? readable : authorities).flat(),
		cert: await Promise.all(readAll(".cert", readPem)),
		key: await Promise.all(readAll(".key", readKey))
	}
}
async function makeSecureContext({caCert, tlsCert, tlsKey, environment}, registryFolders) {
	const ca = await systemCertificates(environment)
	if (caCert !== void 0) ca.push(...(await readAuthorities("`caCert`", caCert)))
	let cert = []
	let key = []
	if (registryFolders !== void 0) {
		const own = await readCertsFolders(registryFolders)
		ca.push(...own.ca)
		cert = tlsCert === void 0 ? [...own.cert] : [await readPem("`tlsCert`", tlsCert)]
		key = tlsKey === void 0 ? [...own.key] : [await readKey("`tlsKey`", tlsKey)]
	}
	try {
		return load("node:tls").createSecureContext({
			ca,
			cert,
			key,
			allowPartialTrustChain: true,
			secureOptions: load("node:crypto").constants.SSL_OP_LEGACY_SERVER_CONNECT
		})
	} catch (cause) {
		const words = printable(cause.message)
		const isStranger = /key values mismatch/i.test(words)
		const said = isStranger ? "the key does not belong to the certificate" : words
		return fail("TLS", `cannot use the certificates given: ${said}`, {cause})
	}
}
function checkIdentity(host, cert) {
	const error = load("node:tls").checkServerIdentity(host, cert)
	const {subjectaltname: names = ""} = cert
	if (!error || !net.isIPv6(host) || names.includes('"')) return error
	const isSame = address => net.isIPv6(address) && new URL(`http://[${address}]`).hostname === `[${host}]`
	const addresses = names.split(", ").map(name => name.replace(/^IP Address:/, ""))
	return addresses.some(isSame) ? void 0 : error
}
var LOOPBACK = "localhost,127.0.0.0/8,::1/128"
var familyOf = address => (net.isIPv6(address) ? "ipv6" : "ipv4")
var withoutBrackets = host => host.replace(/^\[|\]$/g, "")
function isExemptFromProxy(url, noProxy) {
	const entries = `${LOOPBACK},${noProxy}`
		.toLowerCase()
		.split(/[\s,]+/)
		.filter(Boolean)
	return entries.some(entry => isInBlock(url, entry) || isNamedBy(url, entry))
}
function isInBlock(url, block) {
	const host = withoutBrackets(url.hostname)
	const [address = "", bits = ""] = block.split("/")
	if (net.isIP(host) === 0 || net.isIP(address) === 0 || !/^\d+$/.test(bits)) return false
	if (Number(bits) > (net.isIPv6(address) ? 128 : 32)) return false
	const list = new net.BlockList()
	list.addSubnet(address, Number(bits), familyOf(address))
	return list.check(host, familyOf(host))
}
function isNamedBy(url, entry) {
	const withPort = /^(?:\[(?<bracketed>[^\]]*)\]|(?<bare>[^:]*))(?::(?<port>\d+))?$/.exec(entry)
	const {bracketed, bare = entry, port} = withPort?.groups ?? {}
	const urlPort = url.port || (url.protocol === "https:" ? "443" : "80")
	if (port !== void 0 && port !== urlPort) return false
	const host = withoutBrackets(url.hostname)
	const name = (bracketed ?? bare).replace(/^\*?\./, "")
	if (name === "") return false
	if (name === "*" || name === host) return true
	return net.isIP(host) === 0 && host.endsWith(`.${name}`)
}
function proxyFor(url, environment) {
	const variable = name2 => environment[name2] || environment[name2.toLowerCase()] || ""
	const forScheme = url.protocol === "https:" ? "HTTPS_PROXY" : "HTTP_PROXY"
	const name = [forScheme, "ALL_PROXY"].find(variable)
	if (name === void 0 || isExemptFromProxy(url, variable("NO_PROXY"))) return void 0
	const value = variable(name)
	const text = /^[a-z][a-z0-9+.-]*:\/\//i.test(value) ? value : `http://${value}`
	if (!URL.canParse(text)) fail("PROXY", `${name} is not a URL: write http://HOST:PORT`)
	const proxy = new URL(text)
	if (proxy.protocol === "http:" || proxy.protocol === "https:") return proxy
	return fail("PROXY", `${name}: a ${proxy.protocol}// proxy is not supported, only http:// and https:// ones are`)
}
var PROXY_REMEDY = "\n  the proxy wants credentials: http://USER:PASSWORD@HOST:PORT"
var proxyName = ({protocol, host}) => `the proxy ${protocol}//${host}`
function proxyHeaders({username, password}) {
	if (username === "") return {}
	const authorization = basicAuthorization(percentDecode(username), percentDecode(password))
	return {"Proxy-Authorization": authorization}
}
function isFromProxy({statusCode: status = 0, headers}) {
	if (status === 407) return true
	if (status < 400 || headers["docker-distribution-api-version"] !== void 0) return false
	if (status === 502 || status === 504) return true
	if (headers["x-squid-error"] !== void 0 || headers["proxy-status"] !== void 0) return true
	return /^(squid|tinyproxy|privoxy|polipo|mitmproxy)\b/i.test(String(headers.server))
}
var speaks = (language, scheme, {host}) => `it speaks ${language} on this port
  write it as ${scheme}://${host}`
var SOCKS_WORDS = "it speaks SOCKS on this port, which is not supported: an http:// or https:// proxy is needed"
function mistakenProxy(error, proxy) {
	const {rawPacket, message = ""} = error
	if (proxy.protocol === "https:") return PLAIN_HTTP.test(message) ? speaks("plain HTTP", "http", proxy) : void 0
	const [firstByte, secondByte = 0] = rawPacket ?? []
	const isTlsRecord = (firstByte === 21 || firstByte === 22) && secondByte === 3
	if (isTlsRecord) return speaks("TLS", "https", proxy)
	const isSocks = firstByte === 5 || (firstByte === 0 && secondByte >= 90)
	return isSocks ? SOCKS_WORDS : void 0
}
function answersSocks(address) {
	const socket = net.connect(address)
	socket.setTimeout(LIMITS.diagnosisMs, () => socket.destroy())
	socket.write(Buffer.from([5, 1, 0]))
	return new Promise(resolve2 => {
		socket.on("error", ignore)
		socket.once("close", () => resolve2(false))
		socket.once("data", chunk => {
			resolve2(chunk[0] === 5)
			socket.destroy()
		})
	})
}
function answersTls(address) {
	const socket = load("node:tls").connect({...address, rejectUnauthorized: false})
	socket.setTimeout(LIMITS.diagnosisMs, () => socket.destroy())
	return new Promise(resolve2 => {
		socket.on("error", ignore)
		socket.once("close", () => resolve2(false))
		socket.once("secureConnect", () => {
			resolve2(true)
			socket.destroy()
		})
	})
}
var ProxyServer = class {
	url
	#hasAnswered = false
	#secrets
	#diagnosis
	constructor(url, secrets) {
		this.url = url
		this.#secrets = secrets
		secrets.add(percentDecode(url.password), proxyHeaders(url)["Proxy-Authorization"]?.slice(6))
	}
	markAnswered() {
		this.#hasAnswered = true
	}
	refusal(what, response) {
		const {statusCode: status = 0, statusMessage = "", headers} = response
		const retryAfterMs = parseRetryAfter(headers["retry-after"], Date.now())
		const isPassing2 = status === 429 || status >= 500
		const reason = printable(this.#secrets.strikeWords(statusMessage))
		const isLogin = status === 401 || status === 407
		const waitMs = isPassing2 ? retryAfterMs : void 0
		const remedy = isLogin ? PROXY_REMEDY : remedyForWait(waitMs, Date.now())
		const said = `${proxyName(this.url)} refused ${what}: ${status} ${reason}`
		return new ImgpullError("PROXY", `${said}${remedy}`, {
			status,
			retryAfterMs: waitMs
		})
	}
	async tlsPortError({statusCode}, body = "") {
		const isInDoubt = statusCode === 400 && this.url.protocol === "http:" && !this.#hasAnswered
		if (!isInDoubt) return void 0
		const isTold = /HTTP request.* (to|on) (an? )?HTTPS/i.test(body)
		const mistake = isTold ? speaks("TLS", "https", this.url) : await this.#diagnose()
		if (mistake === void 0) return void 0
		return new ImgpullError("PROXY", `${proxyName(this.url)}: ${mistake}`)
	}
	async explain(error, doing) {
		const where = doing === void 0 ? proxyName(this.url) : `${proxyName(this.url)}, ${doing}`
		const isClosed = errorCodeOf(error) === "ECONNRESET" && !this.#hasAnswered
		const isInDoubt = isClosed && this.url.protocol === "http:"
		const mistake = mistakenProxy(error, this.url) ?? (isInDoubt ? await this.#diagnose() : void 0)
		if (mistake === void 0) return connectionError(error, where)
		return new ImgpullError("PROXY", `${where}: ${mistake}`, {cause: error})
	}
	silence(isHandshake, limitMs) {
		const seconds = limitMs / 1e3
		const isDoubtful = isHandshake && this.url.protocol === "https:" && !this.#hasAnswered
		if (!isDoubtful) return timeoutError(proxyName(this.url), `it is silent for ${seconds} s`)
		return new ImgpullError(
			"PROXY",
			`${proxyName(this.url)}: no TLS in ${seconds} s
  if it speaks plain HTTP, write it as http://${this.url.host}`
		)
	}
	#diagnose() {
		const {hostname: hostname2, port} = this.url
		const address = {host: withoutBrackets(hostname2), port: Number(port || 80)}
		this.#diagnosis ??= Promise.all([answersSocks(address), answersTls(address)]).then(([isSocks, isTls]) => {
			if (isSocks) return SOCKS_WORDS
			return isTls ? speaks("TLS", "https", this.url) : void 0
		})
		return this.#diagnosis
	}
}
function connectThrough({proxy, options, timeoutMs}, target, done) {
	const host = net.isIPv6(String(target.host)) ? `[${target.host}]` : target.host
	const authority = `${host}:${target.port}`
	const connect2 = clientFor(proxy.url).request(proxy.url.origin, {
		...options,
		...SOCKET_OPTIONS,
		method: "CONNECT",
		path: authority,
		headers: {Host: authority, ...proxyHeaders(proxy.url)}
	})
	limitConnecting(connect2, timeoutMs, isHandshake => proxy.silence(isHandshake, timeoutMs))
	limitAnswer(connect2, timeoutMs, () => proxy.silence(false, timeoutMs))
	connect2.once("error", async error => done(await proxy.explain(error)))
	connect2.once("connect", async (response, socket, head) => {
		const {statusCode: status = 0} = response
		if (status >= 200 && status < 300) {
			proxy.markAnswered()
			done(null, load("node:tls").connect({...target, socket}))
			return
		}
		socket.destroy()
		const tlsPortError = await proxy.tlsPortError(response, String(head))
		done(tlsPortError ?? proxy.refusal(`CONNECT ${outside(authority)}`, response))
	})
	connect2.end()
}
var AgentPool = class {
	#settings
	#agents = /* @__PURE__ */ new Map()
	#closing = new AbortController()
	#commonContext
	constructor(settings) {
		this.#settings = settings
		setMaxListeners(0, this.#closing.signal)
	}
	agentFor(url, role, proxy) {
		const key = `${url.origin} ${role} ${proxy?.url.href}`
		const agent = this.#agents.get(key) ?? this.#makeAgent(url, role, proxy)
		this.#agents.set(key, agent)
		return agent
	}
	close() {
		this.#closing.abort()
		for (const agent of this.#agents.values()) agent.then(ready => ready.destroy(), ignore)
	}
	async #makeAgent(url, role, proxy) {
		const {timeoutMs, insecure} = this.#settings
		const keepAlive = {keepAlive: true, scheduling: "lifo"}
		const proxyTls = proxy?.url.protocol === "https:" ? await this.#tlsToProxy(proxy.url) : {}
		if (url.protocol === "http:") return new (clientFor(proxy?.url ?? url).Agent)({...keepAlive, ...proxyTls})
		const agent = new (load("node:https").Agent)({
			...keepAlive,
			secureContext: await this.#contextFor(url, role),
			rejectUnauthorized: insecure !== true,
			checkServerIdentity: checkIdentity
		})
		if (!proxy) return agent
		const options = {...proxyTls, agent: false, signal: this.#closing.signal}
		const createConnection = (target, done) => connectThrough({proxy, options, timeoutMs}, target, done)
		return Object.assign(agent, {createConnection})
	}
	async #tlsToProxy(proxy) {
		const host = withoutBrackets(proxy.hostname)
		return {
			secureContext: await this.#contextFor(proxy, "other"),
			servername: net.isIP(host) === 0 ? host : "",
			checkServerIdentity: (_host, cert) => checkIdentity(host, cert)
		}
	}
	async #contextFor(url, role) {
		const {tlsCert, tlsKey, ...common} = this.#settings
		const folders = role === "other" ? [] : await this.#certsFoldersOf(url)
		if (role === "registry" && tlsCert !== void 0) return makeSecureContext(this.#settings, folders)
		if (folders.length > 0) return makeSecureContext(common, folders)
		this.#commonContext ??= makeSecureContext(common)
		return this.#commonContext
	}
	async #certsFoldersOf({host, port}) {
		const names = port === "" ? [host, `${host}:443`] : [host]
		const folders = names.map(name => path.join(this.#settings.certsDirectory, name))
		const lists = await Promise.all(folders.map(listOptional))
		return folders.filter((_folder, index) => lists[index]?.length)
	}
}
var Transport = class {
	#settings
	#secrets
	#agents
	#patience
	#proxies = /* @__PURE__ */ new Map()
	constructor(settings, secrets) {
		this.#settings = settings
		this.#secrets = secrets
		this.#agents = new AgentPool(settings)
		this.#patience = new Patience(settings.timeoutMs)
	}
	send(request) {
		const sendOnce = (url, headers) => this.#sendOnce(request, url, headers)
		return followRedirects(request, sendOnce, this.#secrets)
	}
	close() {
		this.#agents.close()
	}
	async #sendOnce(request, url, headers) {
		const exchange = await this.#open(request, url, headers)
		const {outgoing} = exchange
		outgoing.end(request.body)
		let sentAtMs = performance.now()
		whenConnected(outgoing, () => {
			sentAtMs = performance.now()
		})
		let response
		try {
			;[response] = await once(outgoing, "response", {signal: request.signal})
		} catch (error) {
			if (isStaleConnection(outgoing, error)) return this.#sendOnce(request, url, headers)
			throw await this.#failure(exchange, error)
		}
		const waitedMs = performance.now() - sentAtMs
		const refusal = await proxyRefusal(exchange, response)
		if (refusal) {
			outgoing.destroy()
			throw refusal
		}
		tidyHeaders(response.headers)
		return {response, waitedMs}
	}
	async #open(request, url, headers) {
		const {timeoutMs} = this.#settings
		const {method, signal, isBlob = false} = request
		const doing = `${method} ${redactUrl(url)}`
		const proxy = this.#proxyFor(url)
		const forwarder = url.protocol === "http:" ? proxy : void 0
		const agent = await this.#agents.agentFor(url, request.roleOf(url.origin), proxy)
		const options = {...SOCKET_OPTIONS, method, headers, signal, agent, timeout: timeoutMs}
		const outgoing = forwarder ? forwardRequest(forwarder.url, url, options) : clientFor(url).request(url, options)
		outgoing.maxHeadersCount = 0
		surviveLateErrors(outgoing)
		const isTunnel = proxy !== void 0 && forwarder === void 0
		const connectMs = isTunnel ? 3 * timeoutMs : timeoutMs
		limitConnecting(
			outgoing,
			connectMs,
			isHandshake =>
				forwarder?.silence(isHandshake, connectMs) ?? timeoutError(doing, `nothing came for ${connectMs / 1e3} s`)
		)
		const where = forwarder ? `${proxyName(forwarder.url)}, ${doing}` : doing
		this.#patience.limitHeaders(outgoing, request.url, where)
		limitBody(outgoing, {timeoutMs, isBlob, doing})
		return {request, url, outgoing, forwarder, doing}
	}
	async #failure(exchange, error) {
		const {request, url, outgoing, forwarder, doing} = exchange
		if (error instanceof ImgpullError) return error
		if (forwarder) return forwarder.explain(error, doing)
		const {tlsCert} = this.#settings
		const isShown = tlsCert !== void 0 && request.roleOf(url.origin) === "registry"
		const isInDoubt = isShown && !outgoing.reusedSocket && errorCodeOf(error) === "ECONNRESET"
		if (!isInDoubt) return connectionError(error, doing)
		const words = `${doing}: connection lost
  ${CLIENT_CERTIFICATE_REMEDY}`
		return new ImgpullError("NETWORK", words, {cause: error})
	}
	#proxyFor(url) {
		const proxyUrl = proxyFor(url, this.#settings.environment)
		if (!proxyUrl) return void 0
		const proxy = this.#proxies.get(proxyUrl.href) ?? new ProxyServer(proxyUrl, this.#secrets)
		this.#proxies.set(proxyUrl.href, proxy)
		return proxy
	}
}
async function proxyRefusal({forwarder, doing}, response) {
	const tlsPortError = await forwarder?.tlsPortError(response)
	if (tlsPortError) return tlsPortError
	forwarder?.markAnswered()
	return forwarder && isFromProxy(response) ? forwarder.refusal(doing, response) : void 0
}
function isStaleConnection(outgoing, error) {
	return outgoing.reusedSocket && /^(ECONNRESET$|HPE_)/.test(errorCodeOf(error))
}
function tidyHeaders(headers) {
	for (const [name, value] of Object.entries(headers)) {
		const trimmed = name.trimEnd()
		if (trimmed === name) continue
		headers[trimmed] ??= value
		delete headers[name]
	}
}
function forwardRequest(proxy, url, options) {
	const headers = {...options.headers, Host: url.host, ...proxyHeaders(proxy)}
	return clientFor(proxy).request(proxy.origin, {...options, path: url.href, headers})
}
function surviveLateErrors(outgoing) {
	outgoing.on("error", ignore)
	outgoing.once("socket", socket => socket.off("error", ignore).on("error", ignore))
	outgoing.once("close", () => outgoing.emit("error", new Error("closed without an answer")))
	outgoing.once("response", incoming => incoming.on("error", ignore))
}
function timeoutError(doing, words) {
	return new ImgpullError(
		"TIMEOUT",
		`${doing}: ${words}
  \`timeoutMs\` waits longer`
	)
}
function startDeadline(limitMs, late) {
	let judging
	const timer = setTimeout(() => {
		judging = setImmediate(late)
	}, limitMs)
	return () => {
		clearTimeout(timer)
		clearImmediate(judging)
	}
}
function whenConnected(outgoing, proceed) {
	outgoing.once("socket", socket => {
		if (outgoing.reusedSocket) proceed()
		else socket.once("encrypted" in socket ? "secureConnect" : "connect", proceed)
	})
}
function limitConnecting(outgoing, limitMs, lateError) {
	const isHandshake = () => outgoing.socket?.connecting === false
	const callOff = startDeadline(limitMs, () => outgoing.destroy(lateError(isHandshake())))
	whenConnected(outgoing, callOff)
	outgoing.once("close", callOff)
}
function limitAnswer(outgoing, limitMs, lateError) {
	whenConnected(outgoing, () => {
		const callOff = startDeadline(limitMs, () => outgoing.destroy(lateError()))
		for (const end of ["response", "connect", "close"]) outgoing.once(end, callOff)
	})
}
var Patience = class {
	#timeoutMs
	#factors = /* @__PURE__ */ new Map()
	constructor(timeoutMs) {
		this.#timeoutMs = timeoutMs
	}
	limitHeaders(outgoing, asked, doing) {
		const key = `${asked.origin}${asked.pathname}`
		const factor = this.#factors.get(key) ?? 1
		const limitMs = factor * this.#timeoutMs
		limitAnswer(outgoing, limitMs, () => {
			this.#factors.set(key, Math.min(2 * factor, LIMITS.headersWaitFactor))
			return timeoutError(doing, `nothing came for ${limitMs / 1e3} s`)
		})
	}
}
function limitBody(outgoing, limits) {
	const {timeoutMs, isBlob, doing} = limits
	outgoing.once("response", incoming => {
		const {socket} = incoming
		const judge2 = readBefore => {
			const hasCome = socket.bytesRead > readBefore
			if (hasCome || isReaderSlow(incoming)) outgoing.setTimeout(timeoutMs)
			else incoming.destroy(timeoutError(doing, `nothing came for ${timeoutMs / 1e3} s`))
		}
		outgoing.on("timeout", () => setImmediate(judge2, socket.bytesRead))
		const isRefusal2 = (incoming.statusCode ?? 0) >= 300
		if (isBlob && !isRefusal2) return limitSlowness(incoming, 2 * timeoutMs, doing)
		const limitMs = isRefusal2 ? timeoutMs : LIMITS.documentWaitFactor * timeoutMs
		const callOff = startDeadline(limitMs, () => {
			incoming.destroy(timeoutError(doing, `the answer was not whole after ${limitMs / 1e3} s`))
		})
		incoming.once("close", callOff)
	})
}
var isReaderSlow = incoming => incoming.readableLength > 0
function limitSlowness(incoming, periodMs, doing) {
	const leastBytes = (LIMITS.slowBytesPerSecond * periodMs) / 1e3
	const {socket} = incoming
	let readBefore = socket.bytesRead
	const judge2 = () => {
		const {bytesRead} = socket
		const cameBytes = bytesRead - readBefore
		readBefore = bytesRead
		if (cameBytes >= leastBytes || isReaderSlow(incoming)) return
		const words = `only ${cameBytes} bytes came in ${periodMs / 1e3} s`
		incoming.destroy(timeoutError(doing, words))
	}
	const timer = setInterval(() => setImmediate(judge2), periodMs)
	incoming.once("close", () => clearInterval(timer))
}
async function followRedirects(request, sendOnce, secrets) {
	let {url} = request
	for (let hops = 0; ; hops += 1) {
		const authorization = await request.authorizationFor(url.origin)
		secrets.add(authorization?.replace(/^\S+ /, ""))
		const {response, waitedMs} = await sendOnce(url, {
			"User-Agent": `imgpull/${"1.0.0"}`,
			"Accept-Encoding": "identity",
			...request.headers,
			...dropEmpty({Authorization: authorization})
		})
		const {statusCode: status = 0, headers} = response
		const isElsewhere = url.origin !== request.url.origin && url.search !== ""
		const answer = {status, headers, url, isElsewhere, authorization, words: "", waitedMs}
		if (status >= 200 && status < 300) return {...answer, body: response}
		const isRedirect = [301, 302, 303, 307, 308].includes(status) && request.body === void 0
		if (!isRedirect || headers.location === void 0)
			return {...answer, words: printable(secrets.strikeWords(await readWords(response)))}
		dropBody(response)
		if (hops >= LIMITS.redirects) fail("PROTOCOL", `${redactUrl(url)}: more than ${LIMITS.redirects} redirects`)
		url = redirectTarget(url, headers.location)
		secrets.addSigned(url)
		if (request.mayAsk?.(url) === false)
			fail("PROTOCOL", `${redactUrl(request.url)} redirects to ${redactUrl(url)}: not followed there`)
	}
}
function redirectTarget(from, location) {
	if (!URL.canParse(location, from)) fail("PROTOCOL", `${redactUrl(from)} redirects to no URL`)
	const target = new ForeignUrl(decodeLatin1(location), from)
	const isFollowed = target.protocol === "https:" || (target.protocol === "http:" && from.protocol === "http:")
	if (isFollowed) return target
	const way = `from ${from.protocol} to ${outside(target.protocol)}`
	return fail("PROTOCOL", `${redactUrl(from)} redirects to ${redactUrl(target)}: not followed ${way}`)
}
function decodeLatin1(text) {
	const bytes = Buffer.from(text, "latin1")
	const decoded = bytes.toString("utf8")
	return decoded.includes("�") ? text : decoded
}
function dropBody(response) {
	let length = 0
	response.on("error", ignore).on("data", chunk => {
		length += chunk.length
		if (length > LIMITS.redirectBodyBytes) response.destroy()
	})
}
var isGzip = bytes => bytes?.[0] === 31 && bytes[1] === 139
async function decodeBody(response, expectedBytes) {
	const {"content-encoding": encoding = "", "content-length": length} = response.headers
	const isRaw = Number(length) === expectedBytes
	if (!/^(x-)?gzip$/i.test(encoding) || isRaw) return response
	await Promise.race([once(response, "readable"), once(response, "close")]).catch(ignore)
	const head = response.read()
	if (head) response.unshift(head)
	if (!isGzip(head)) return response
	const decoded = load("node:zlib").createGunzip()
	response.once("error", error => decoded.destroy(error))
	return response.pipe(decoded.once("close", () => response.destroy()))
}
async function readBody(response, maximumBytes, what, digest) {
	const checkSize = bytes => {
		if (bytes > maximumBytes) fail("TOO_LARGE", `${what} is larger than ${maximumBytes} bytes`)
	}
	const chunks = []
	let length = 0
	try {
		checkSize(Number(response.headers["content-length"] ?? 0))
		for await (const chunk of response) {
			length += chunk.length
			checkSize(length)
			chunks.push(chunk)
		}
		const bytes = Buffer.concat(chunks)
		if (!isGzip(bytes) || (digest && digestOf(bytes, digest) === digest)) return bytes
		return load("node:zlib").gunzipSync(bytes, {maxOutputLength: maximumBytes})
	} catch (error) {
		response.destroy()
		if (errorCodeOf(error) === "ERR_BUFFER_TOO_LARGE") checkSize(NEVER)
		throw connectionError(error, what)
	}
}
async function readWords(response) {
	try {
		return wordsOfError(await readBody(response, LIMITS.errorBodyBytes, "the error's body"))
	} catch (error) {
		if (error.code === "ABORTED") throw error
		return ""
	}
}
function wordsOfError(body) {
	const json = parseJson(body)
	if (!isRecord(json)) {
		const text = String(body)
		return /^[\s\ufeff]*</.test(text) ? wordsOfXml(text) : text
	}
	const first = Array.isArray(json.errors) ? json.errors[0] : void 0
	const {code, message} = isRecord(first) ? first : {}
	const candidates = [code, message, json.details, json.message, json.error_description, json.error]
	const words = candidates.filter(word => typeof word === "string" && word !== "")
	return words.slice(0, 2).join(": ")
}
function wordsOfXml(text) {
	if (!/<Error[\s>]/.test(text)) return ""
	const words = ["Code", "Message"].map(name => {
		const [, content = ""] = new RegExp(`<${name}>([^<]*)</${name}>`).exec(text) ?? []
		return content.replace(/&(lt|gt|quot|apos|amp);/g, (_all, entity) => XML_ENTITIES[entity] ?? "")
	})
	return words.filter(Boolean).join(": ")
}
var XML_ENTITIES = {lt: "<", gt: ">", quot: '"', apos: "'", amp: "&"}
var sleep = (waitMs, signal) => delay(waitMs, void 0, {signal})
var systemClock = {now: Date.now, random: Math.random, sleep}
function isRetriable(error) {
	if (!(error instanceof ImgpullError)) return false
	const {code, status = 0, retryAfterMs} = error
	if (code === "NETWORK") return !["ENOTFOUND", "ERR_ACCESS_DENIED"].includes(errorCodeOf(error.cause))
	if (code === "TIMEOUT" || code === "RATE_LIMITED") return true
	if (code === "DIGEST_MISMATCH" || code === "SIZE_MISMATCH") return true
	if (retryAfterMs !== void 0) return true
	if (status === 408 || status === 425 || status === 429) return true
	return status >= 500 && status !== 501 && status !== 505
}
function retryDelayMs(error, failures, retries, random) {
	if (!isRetriable(error)) return void 0
	const {code, retryAfterMs = 0} = error
	const isMismatch = code === "DIGEST_MISMATCH" || code === "SIZE_MISMATCH"
	const most = isMismatch ? Math.min(1, retries) : retries
	if (failures > most) return void 0
	if (retryAfterMs > LIMITS.retryAfterMs) return void 0
	const ceilingMs = Math.min(LIMITS.backoffMs, LIMITS.firstBackoffMs * 2 ** (failures - 1))
	const backoffMs = Math.round(ceilingMs * (0.5 + random / 2))
	return Math.max(retryAfterMs, backoffMs)
}
async function withRetries({clock, settings, signal, warn}, attempt, gotOn = () => false) {
	const {retries} = settings
	for (let failures = 1; ; failures += 1) {
		try {
			return await attempt()
		} catch (error) {
			if (signal.aborted) stopped(error)
			if (gotOn()) failures = 1
			const waitMs = retryDelayMs(error, failures, retries, clock.random())
			if (waitMs === void 0) throw error
			const reason = firstLineOf(error.message)
			const seconds = (waitMs / 1e3).toFixed(1)
			warn(`${reason}; trying again in ${seconds} s (${failures} of ${retries})`)
			await clock.sleep(waitMs, signal).catch(stopped)
		}
	}
}
function parseChallenges(lines) {
	const challenges = []
	const word = /([\s,;:]*)([!#$%&'*+.^_`|~0-9A-Za-z/-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"?|[^\s,;"]*))?/gy
	for (const match of lines.flatMap(line => [...line.matchAll(word)])) {
		const [, separator = "", name = "", value] = match
		const current = challenges.at(-1)?.parameters
		const isToken68 = value !== void 0 && /^=*$/.test(value)
		const isFirst = match.index === 0 || /[,;]/.test(separator) || isUsable(name.toLowerCase())
		if (value === void 0 && isFirst) {
			challenges.push({scheme: name.toLowerCase(), parameters: {}})
		} else if (current && value !== void 0 && !isToken68) {
			current[name.toLowerCase()] ??= value.replace(/^["']|["']$/g, "").replace(/\\(.)/g, "$1")
		}
	}
	return challenges
}
var challengesOf = ({headers}) => parseChallenges([headers["www-authenticate"] ?? ""])
var isUsable = scheme => scheme === "bearer" || scheme === "basic"
var hasUsable = challenges => challenges.some(({scheme}) => isUsable(scheme))
var homeOf = ({HOME}) => HOME ?? os.homedir()
var below = (directory, ...names) => (directory ? path.join(directory, ...names) : void 0)
var AUTH_JSON = "containers/auth.json"
function runtimeDirectory({XDG_RUNTIME_DIR}) {
	if (XDG_RUNTIME_DIR !== void 0) return below(XDG_RUNTIME_DIR, "containers")
	const userId = process.getuid?.()
	return userId === void 0 ? void 0 : `/run/containers/${userId}`
}
var CREDENTIAL_PLACES = [
	{variable: "REGISTRY_AUTH_FILE", file: environment => environment.REGISTRY_AUTH_FILE},
	{variable: "DOCKER_AUTH_CONFIG", text: environment => environment.DOCKER_AUTH_CONFIG},
	{
		file: environment => below(environment.DOCKER_CONFIG || below(homeOf(environment), ".docker"), "config.json")
	},
	{file: environment => below(runtimeDirectory(environment), "auth.json")},
	{
		file: environment => below(environment.XDG_CONFIG_HOME || below(homeOf(environment), ".config"), AUTH_JSON)
	},
	{file: environment => below(homeOf(environment), ".dockercfg"), isAuthsOnly: true}
]
async function findCredential(session, owner) {
	const {settings} = session
	const fromOptions = owner.role === "registry" ? credentialOfOptions(settings) : void 0
	if (fromOptions) return fromOptions
	const {environment} = settings
	for (const place of CREDENTIAL_PLACES) {
		const file = place.file?.(environment)
		const text = file ? await readCredentialFile(file, place.variable) : place.text?.(environment)
		if (!text) continue
		const source = file ?? place.variable ?? ""
		const json = parseJson(text)
		if (!isRecord(json)) return fail("CREDENTIALS", `${source} is not a JSON object`)
		const content = place.isAuthsOnly ? {auths: json} : json
		const credential = await credentialIn({...content, source}, owner, session)
		if (credential) return credential
	}
	return void 0
}
function credentialOfOptions({token, username, password}) {
	const common = {kind: "basic", username: username ?? "", stored: false}
	if (token !== void 0) return {...common, secret: token, source: "`token`"}
	if (username === void 0) return void 0
	return {...common, secret: password ?? "", source: "`username` and `password`"}
}
async function readCredentialFile(file, variable) {
	const what = variable === void 0 ? `the credential file ${file}` : `${variable} names ${file}`
	const isMissing = cause => ["ENOENT", "ENOTDIR", "ERR_ACCESS_DENIED"].includes(errorCodeOf(cause))
	try {
		if ((await fs.stat(file)).size <= LIMITS.credentialFileBytes) return await fs.readFile(file, "utf8")
	} catch (cause) {
		if (variable === void 0 && isMissing(cause)) return void 0
		fail("CREDENTIALS", `${what}: ${diskWords(cause)}`, {cause})
	}
	return fail("CREDENTIALS", `${what}: too large for a credential file`)
}
async function credentialIn({source, auths, credHelpers, credsStore}, {reference, scheme}, session) {
	const {host} = reference
	const wanted = normalizeAuthKey(placeOf(reference), scheme)
	const isName = value => typeof value === "string" && value !== ""
	const isFilled = value => isRecord(value) && Object.keys(value).length > 0
	const helper = longestPath(entriesOfHost(credHelpers, wanted, scheme, isName), wanted)?.value
	const program = helper ?? credsStore
	const server = host === "docker.io" ? "https://index.docker.io/v1/" : host
	const fromHelper = isName(program) && (await askHelperOnce(program, server, session))
	if (fromHelper) return fromHelper
	const entries = entriesOfHost(auths, wanted, scheme, isFilled)
	const entry = longestPath(entries, wanted) ?? entries[0]
	return entry && decodeAuthEntry(entry.value, source)
}
function normalizeAuthKey(written, scheme) {
	const [authority = "", ...path2] = written
		.replace(/^https?:\/\//i, "")
		.replace(/\/(v1|v2)?\/?$/, "")
		.split("/")
	const defaultPort = scheme === "http" ? /:80$/ : /:443$/
	const host = authority.toLowerCase().replace(defaultPort, "")
	return {host: canonicalHost(host), path: path2}
}
function entriesOfHost(entries, {host}, scheme, isUsable2) {
	const ofHost = []
	for (const [written, value] of Object.entries(entries ?? {})) {
		const key = normalizeAuthKey(written, scheme)
		if (key.host === host && isUsable2(value)) ofHost.push({...key, value})
	}
	return ofHost.sort((left, right) => left.path.length - right.path.length)
}
function longestPath(entries, {path: path2}) {
	return entries.findLast(entry => entry.path.every((part, at) => part === path2[at]))
}
function decodeAuthEntry(entry, source) {
	const text = name => (typeof entry[name] === "string" ? entry[name] : "")
	const decoded = Buffer.from(text("auth"), "base64").toString("utf8").replace(/\0+$/, "")
	if (text("auth") && !decoded.includes(":")) fail("CREDENTIALS", `${source}: "auth" is not USER:PASSWORD in base64`)
	const [, username = text("username"), password = text("password")] = /^([^:]*):(.*)$/s.exec(decoded) ?? []
	const common = {username, source, stored: true}
	const identity = text("identitytoken")
	if (identity) return {...common, kind: "identity", secret: identity}
	const bearer = text("registrytoken")
	if (!isHeaderWord(bearer || "-")) fail("CREDENTIALS", `${source}: its "registrytoken" fits no header`)
	if (bearer) return {...common, kind: "bearer", secret: bearer}
	if (username === "" && password === "") return void 0
	return {...common, kind: "basic", secret: password}
}
var isHeaderWord = text => /^[\x21-\x7e]+$/.test(text)
function runHelper(program, input, {environment}, signal) {
	const options = {
		env: {...environment},
		timeout: LIMITS.helperMs,
		killSignal: "SIGKILL",
		maxBuffer: LIMITS.tokenBytes,
		encoding: "utf8"
	}
	return new Promise(resolve2 => {
		const {execFile} = load("node:child_process")
		const child = execFile(program, ["get"], options, (failure, stdout, stderr) => {
			signal.removeEventListener("abort", stop)
			resolve2({failure, stdout, stderr})
		})
		const stop = () => {
			child.kill("SIGKILL")
			child.stdout?.destroy()
			child.stderr?.destroy()
		}
		signal.addEventListener("abort", stop)
		child.stdin?.on("error", ignore).end(input)
	})
}
function askHelperOnce(name, server, session) {
	const key = `${name} ${server}`
	const asking = session.helpers.get(key) ?? askHelper(name, server, session)
	session.helpers.set(key, asking)
	return asking
}
async function askHelper(name, server, {settings, signal}) {
	const source = `docker-credential-${name}`
	const refuse = reason => fail("CREDENTIALS", `the credential helper ${printable(source)} ${reason}`)
	if (!/^[\w.+-]+$/.test(name)) refuse("has a name that is not one")
	const {stdout, stderr, failure} = await runHelper(source, server, settings, signal)
	if (signal.aborted) fail("ABORTED", "stopped")
	const code = failure?.code
	if (typeof code === "string") {
		if (code === "ENOENT") refuse("cannot be run: it is not on the PATH")
		refuse(`cannot be run: ${code}`)
	}
	if (failure?.killed) refuse(`has not answered in ${LIMITS.helperMs / 1e3} s`)
	if (failure && /credentials not found/i.test(`${stdout}${stderr}`)) return void 0
	if (failure) refuse(`failed: ${printable(stderr) || `exit code ${code ?? failure.signal}`}`)
	if (stdout.trim() === "") return void 0
	const answer = parseJson(stdout)
	if (!isRecord(answer)) return refuse("answered what is not a JSON object")
	if (Object.keys(answer).length === 0) return void 0
	const {Username: username = "", Secret: secret} = answer
	if (typeof username !== "string" || typeof secret !== "string") return refuse("answered without a Secret")
	const entry = username === "<token>" ? {identitytoken: secret} : {username, password: secret}
	return decodeAuthEntry(entry, source)
}
var STORAGE_HOST = "the storage host"
var STATUS_CODES = {
	401: "UNAUTHORIZED",
	403: "FORBIDDEN",
	404: "NOT_FOUND",
	407: "PROXY",
	429: "RATE_LIMITED"
}
function statusError(answer, now, who) {
	const {status, words, headers, url} = answer
	const mayWait = status === 429 || status >= 500
	const waitMs = mayWait ? parseRetryAfter(headers["retry-after"], now) : void 0
	const remedy = remedyFor(answer, waitMs, now)
	const said = `${redactUrl(url)}: ${who} answered ${status}${words ? ` (${words})` : ""}${remedy}`
	const isExpired = who === STORAGE_HOST && [400, 401, 403].includes(status)
	return new ImgpullError(STATUS_CODES[status] ?? "PROTOCOL", said, {
		status,
		retryAfterMs: isExpired ? 0 : waitMs
	})
}
function remedyFor({status, words}, waitMs, now) {
	if (status === 407) return PROXY_REMEDY
	if (status === 429)
		return `
  too many requests: ${whenToComeBack(waitMs, now)}`
	const isHttpsPort = /HTTP request (was sent )?to (an )?HTTPS/i.test(words)
	return isHttpsPort ? "\n  this port is https: try without `scheme` http" : remedyForWait(waitMs, now)
}
var remedyForWait = (waitMs = 0, now) =>
	waitMs > LIMITS.retryAfterMs
		? `
  ${whenToComeBack(waitMs, now)}`
		: ""
function whenToComeBack(waitMs, now) {
	if (!waitMs) return "try again later"
	if (waitMs > LIMITS.absurdWaitMs)
		return "it says not to come back for more than a year: ask who runs it, or try again later"
	const date = new Date(now + waitMs)
	return `come back in ${Math.ceil(waitMs / 1e3)} s, at ${date.toISOString()}`
}
var NOBODY = "00000000-0000-0000-0000-000000000000"
async function fetchToken(context, request) {
	const url = parseRealm(request)
	return (await exchangeIdentityToken(context, url, request)) ?? (await getToken(context, url, request))
}
function parseRealm({parameters: {realm}, origin, role}) {
	const registry = role === "other" ? outside(origin) : origin
	if (!realm || !URL.canParse(realm, origin))
		return fail("PROTOCOL", `${registry} names no usable realm for its tokens`)
	const url = new ForeignUrl(realm, origin)
	const named = `${registry} names the token endpoint ${redactUrl(url)}`
	const isPrivateEnough = ["https:", new URL(origin).protocol].includes(url.protocol)
	if (!isPrivateEnough) fail("PROTOCOL", `${named}: not over ${url.protocol}`)
	if (leadsInside(url, origin)) fail("PROTOCOL", `${named}: an address inside a network, where the registry is not`)
	return url
}
var INSIDE_BLOCKS = [
	"0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16",
	"::/127 fc00::/7 fe80::/10 ff02::/16"
]
	.join(" ")
	.split(" ")
function leadsInside({hostname: hostname2}, registryOrigin) {
	const address = withoutBrackets(hostname2)
	const isOwn2 = hostname2 === new URL(registryOrigin).hostname
	if (isOwn2 || net.isIP(address) === 0) return false
	const blocks = new net.BlockList()
	for (const block of INSIDE_BLOCKS) {
		const [network = "", bits] = block.split("/")
		blocks.addSubnet(network, Number(bits), familyOf(network))
	}
	return blocks.check(address, familyOf(address))
}
async function exchangeIdentityToken(context, url, request) {
	const {credential, parameters} = request
	if (credential?.kind !== "identity") return void 0
	const {service, scope} = parameters
	const grant = {
		...dropEmpty({service, scope}),
		grant_type: "refresh_token",
		client_id: "imgpull",
		refresh_token: credential.secret
	}
	const answer = await context.transport.send({
		...tokenHttpRequest(context, url, request),
		method: "POST",
		headers: {"Content-Type": "application/x-www-form-urlencoded"},
		body: String(new URLSearchParams(grant))
	})
	if (isNoOAuth2(answer.status)) return void 0
	return readToken(context, url, answer)
}
function isNoOAuth2(status) {
	const isForLater = [408, 425, 429].includes(status)
	return status === 501 || (status >= 300 && status < 500 && !isForLater)
}
async function getToken(context, url, request) {
	const {credential, parameters} = request
	const {service, scope} = parameters
	const asked = new ForeignUrl(url)
	for (const [name, value] of Object.entries(dropEmpty({service, scope}))) asked.searchParams.set(name, value)
	const header = credential && basicAuthorization(credential.username || NOBODY, credential.secret)
	const answer = await context.transport.send(tokenHttpRequest(context, asked, request, header))
	const token = await readToken(context, url, answer)
	return token ?? fail("PROTOCOL", `${redactUrl(url)} answered without a token`)
}
var tokenHttpRequest = ({signal}, url, {origin, role}, header) => ({
	method: "GET",
	url,
	headers: {},
	signal,
	authorizationFor: async each => (each === url.origin ? header : void 0),
	roleOf: each => (each === origin ? role : "other")
})
async function readToken({clock}, url, answer) {
	const now = clock.now()
	if (!answer.body) throw statusError(answer, now, "the token service")
	const what = `the token of ${redactUrl(url)}`
	return parseToken(await readBody(answer.body, LIMITS.tokenBytes, what), now)
}
function parseToken(body, now) {
	const json = parseJson(body)
	const answer = isRecord(json) ? json : {}
	const token = answer.token || answer.access_token
	if (typeof token !== "string" || !isHeaderWord(token)) return void 0
	const seconds = typeof answer.expires_in === "number" ? answer.expires_in : 0
	return {
		header: `Bearer ${token}`,
		expiresAt: now + Math.max(LIMITS.tokenFloorMs, seconds * 1e3)
	}
}
var Authorizer = class {
	#session
	#owner
	#registryOrigin
	#authorizations = /* @__PURE__ */ new Map()
	#renewals = /* @__PURE__ */ new Map()
	#taken = /* @__PURE__ */ new WeakSet()
	#lookup
	#fate = "unsent"
	#refusedCredential
	#otherScope
	#offer
	constructor(session, owner, registryOrigin) {
		const {token} = session.settings
		this.#session = session
		this.#owner = owner
		this.#registryOrigin = registryOrigin
		if (token !== void 0 && owner.role === "registry") {
			this.#authorizations.set(registryOrigin, {header: `Basic ${token}`, expiresAt: NEVER})
			this.#fate = "sent"
		}
	}
	async headerFor(origin) {
		const expiresAt = this.#authorizations.get(origin)?.expiresAt ?? 0
		const isExpired = expiresAt <= this.#session.clock.now()
		const isWanted = hasUsable(this.#session.challenges.get(origin) ?? [])
		if (isWanted && isExpired) await this.#renew(origin)
		return this.#authorizations.get(origin)?.header
	}
	hear(answer) {
		const {origin} = answer.url
		const isRedirected = origin !== this.#registryOrigin
		const ours = this.#authorizations.get(this.#registryOrigin)
		const theirs = this.#authorizations.get(origin)
		if (isRedirected && ours) this.#taken.add(ours)
		if (answer.body && theirs && theirs.header === answer.authorization) this.#taken.add(theirs)
		const challenges = challengesOf(answer)
		const isNews = answer.status === 401 && !this.#session.challenges.has(origin)
		if (isNews && hasUsable(challenges)) this.#session.challenges.set(origin, challenges)
	}
	async canGoOnAfter(answer, kind) {
		const {origin} = answer.url
		if (origin === this.#registryOrigin && isSilentRefusal(answer)) {
			this.#offer ??= this.#offerCredential(origin)
			return this.#offer
		}
		if (!isAboutAuthorization(answer)) return false
		const underWay = this.#renewals.get(origin)
		if (underWay) return underWay
		if (this.#isReplaced(answer)) return true
		const isStale = this.#isStale(answer)
		if (isProof(kind) && answer.authorization !== void 0 && !isStale) return false
		this.#learnChallenge(answer, isStale)
		if (!isStale && answer.authorization !== void 0) return this.#replaceRefused(answer)
		return this.#renew(origin).catch(error => {
			if (isProof(kind)) this.#session.challenges.delete(origin)
			throw error
		})
	}
	#isReplaced({url, authorization: sent}) {
		return this.#authorizations.get(url.origin)?.header !== sent
	}
	#isStale({url, status}) {
		const current = this.#authorizations.get(url.origin)
		if (!current || status === 403 || current.header.startsWith("Basic ")) return false
		return this.#taken.has(current)
	}
	#learnChallenge(answer, isStale) {
		const {origin} = answer.url
		const challenges = challengesOf(answer)
		const isKnown = isStale && this.#session.challenges.has(origin)
		if (challenges.length > 0 && !isKnown) this.#session.challenges.set(origin, challenges)
	}
	async #replaceRefused(answer) {
		const {url, status} = answer
		if (this.#takeOtherScope(url.origin, challengesOf(answer))) return this.#renew(url.origin)
		const credential = await this.#credentialFor(url.origin)
		if (this.#isReplaced(answer)) return true
		if (!credential?.stored) return false
		this.#goAnonymous(credential, `${redactUrl(url)}: ${status}`)
		await this.#renew(url.origin)
		return true
	}
	async #offerCredential(origin) {
		if (!(await this.#credentialFor(origin))) return false
		const {signal, transport, challenges} = this.#session
		const answer = await transport.send({
			method: "GET",
			url: new URL("/v2/", origin),
			headers: {},
			signal,
			authorizationFor: async () => void 0,
			roleOf: each => this.#roleOf(each)
		})
		answer.body?.destroy()
		const offered = challengesOf(answer)
		if (answer.url.origin !== origin || !hasUsable(offered)) return false
		challenges.set(origin, offered)
		return this.#renew(origin)
	}
	async explain({code, message, status}) {
		const explained = code === "FORBIDDEN" ? code : "UNAUTHORIZED"
		return new ImgpullError(
			explained,
			`${message}
  ${await this.#triedWords()}`,
			{status}
		)
	}
	async #triedWords() {
		const place = placeOf(this.#owner.reference)
		const isAccepted = this.#fate === "accepted"
		if (this.#refusedCredential) {
			const stored = `the stored credentials (${this.#refusedCredential.source})`
			return isAccepted
				? `${stored} are right, but may not pull ${place}, nor may a request without`
				: `${stored} were refused, and so was a request without`
		}
		const credential = await this.#credentialFor(this.#registryOrigin)
		if (!credential)
			return "no credentials were found (`username`, `token`, docker login); a repository that does not exist looks the same"
		if (this.#fate === "unsent")
			return `the credentials of ${credential.source} were not sent: the registry asks for none of their kind`
		return isAccepted
			? `the credentials of ${credential.source} are right, but may not pull ${place}`
			: `refused: the credentials of ${credential.source}`
	}
	async #credentialFor(origin) {
		if (this.#refusedCredential || origin !== this.#registryOrigin) return void 0
		this.#lookup ??= findCredential(this.#session, this.#owner)
		const credential = await this.#lookup
		this.#session.secrets.add(credential?.secret)
		return credential
	}
	#goAnonymous(refused, reason) {
		this.#refusedCredential = refused
		this.#otherScope = void 0
		this.#authorizations.delete(this.#registryOrigin)
		const outcome = this.#fate === "accepted" ? "do not open it" : "were refused"
		this.#session.warn(`the credentials of ${refused.source} ${outcome} (${reason}); trying without any`)
	}
	#renew(origin) {
		const underWay = this.#renewals.get(origin)
		if (underWay) return underWay
		const renewal = this.#renewOnce(origin).finally(() => this.#renewals.delete(origin))
		this.#renewals.set(origin, renewal)
		return renewal
	}
	async #renewOnce(origin) {
		const authorization = await this.#answerChallenge(origin)
		if (authorization) this.#authorizations.set(origin, authorization)
		return authorization !== void 0
	}
	async #answerChallenge(origin) {
		const challenges = this.#session.challenges.get(origin) ?? []
		const credential = await this.#credentialFor(origin)
		const bearers = challenges.filter(({scheme}) => scheme === "bearer")
		const takesBasic = bearers.length < challenges.filter(({scheme}) => isUsable(scheme)).length
		if (bearers.length > 0 && credential?.kind === "bearer") {
			this.#fate = "sent"
			return {header: `Bearer ${credential.secret}`, expiresAt: NEVER}
		}
		const bearer = bearers.find(({parameters}) => parameters.realm) ?? (takesBasic ? void 0 : bearers[0])
		if (bearer) return this.#tokenFor(origin, bearer, credential)
		if (!takesBasic || credential?.kind !== "basic") return void 0
		const {username, secret} = credential
		this.#fate = "sent"
		return {header: basicAuthorization(username, secret), expiresAt: NEVER}
	}
	async #tokenFor(origin, {parameters}, credential) {
		const role = this.#roleOf(origin)
		const scope = this.#scopeFor(role, parameters.scope)
		if (credential) this.#fate = "sent"
		try {
			const request = {origin, role, parameters: {...parameters, scope}, credential}
			const token = await fetchToken(this.#session, request)
			if (credential) this.#fate = "accepted"
			return token
		} catch (error) {
			const {status = 0, message} = error
			if (![400, 401, 403, 404].includes(status)) throw error
			if (this.#takeOtherScope(origin, [{scheme: "bearer", parameters}])) return this.#answerChallenge(origin)
			if (credential?.stored) {
				this.#goAnonymous(credential, message)
				return this.#answerChallenge(origin)
			}
			const isAboutCredentials = status === 401 || credential !== void 0
			throw isAboutCredentials ? await this.explain(error) : error
		}
	}
	#scopeFor(role, theirs) {
		const ours = `repository:${this.#owner.reference.repository}:pull`
		if (role !== "other") return this.#otherScope ?? ours
		return theirs || ours
	}
	#roleOf(origin) {
		return origin === this.#registryOrigin ? this.#owner.role : "other"
	}
	#takeOtherScope(origin, challenges) {
		if (origin !== this.#registryOrigin || this.#otherScope !== void 0) return false
		const bearer = challenges.find(({scheme}) => scheme === "bearer")
		this.#otherScope = otherScope(bearer?.parameters.scope, this.#owner.reference.repository)
		return this.#otherScope !== void 0
	}
}
function otherScope(scopes = "", repository) {
	for (const scope of scopes.split(" ").filter(Boolean)) {
		const [, name] = /^repository(?:\([^)]*\))?:(.+):[^:]*$/.exec(scope) ?? []
		if (name === void 0) return scope
		if (name !== repository) return `repository:${name}:pull`
	}
	return void 0
}
function isSilentRefusal(answer) {
	const {status, authorization: sent} = answer
	if (sent !== void 0) return false
	return status === 403 || status === 404 || (status === 401 && !hasUsable(challengesOf(answer)))
}
function isAboutAuthorization({status, authorization: sent}) {
	if (status === 401) return true
	if (status === 400) return sent?.startsWith("Bearer ") === true
	return status === 403 && sent !== void 0
}
var PATHS = {
	manifest: "manifests",
	blob: "blobs",
	proof: "manifests",
	referrer: "referrers"
}
var isProof = kind => kind === "proof" || kind === "referrer"
var ANY_TYPE = "*/*"
var Endpoint = class {
	name
	origin
	role
	#session
	#reference
	#namespace
	#authorizer
	#manifestTypes = MANIFEST_TYPES.join(", ")
	#firstContact
	#hasServed = false
	#acceptsRanges = true
	constructor(session, reference, mirror) {
		const {scheme, namespace} = session.settings
		const place = mirror ?? {scheme, host: reference.host, prefix: ""}
		const repository = `${place.prefix}/${reference.repository}`.replace(/^\//, "")
		this.name = `${place.host}/${place.prefix}`.replace(/\/$/, "")
		this.origin = new URL(`${place.scheme}://${apiHost(place.host)}`).origin
		this.role = mirror ? "mirror" : "registry"
		this.#session = session
		this.#reference = {...reference, host: place.host, repository}
		this.#namespace = mirror ? reference.host : namespace
		const owner = {reference: this.#reference, scheme: place.scheme, role: this.role}
		this.#authorizer = new Authorizer(session, owner, this.origin)
	}
	get hasServed() {
		return this.#hasServed
	}
	get acceptsRanges() {
		return this.#acceptsRanges
	}
	giveUpRanges() {
		this.#acceptsRanges = false
	}
	#urlOf(kind, name) {
		const url = new URL(`${this.origin}/v2/${this.#reference.repository}/${PATHS[kind]}/${name}`)
		if (this.#namespace !== void 0) url.searchParams.set("ns", this.#namespace)
		return url
	}
	async manifest(tagOrDigest, kind = "manifest") {
		const document = await this.document(kind, tagOrDigest, LIMITS.manifestBytes)
		const {bytes, digest, where, type} = document
		const mediaType = sniffMediaType(bytes, type)
		if (mediaType !== void 0) return {bytes, digest, mediaType}
		const what = `this is not a manifest but ${outside(type, 80)}`
		return fail("PROTOCOL", `${where}: ${what}: is ${this.#reference.host} a registry?`)
	}
	async document(kind, name, maximumBytes) {
		const {body, url, headers} = await this.request("GET", kind, name)
		const where = redactUrl(url)
		const what = `the ${kind} ${where}`
		const sought = isDigest(name) ? name : void 0
		const bytes = await readBody(body, maximumBytes, what, sought)
		const digest = isDigest(name) ? digestOf(bytes, name) : digestByName(bytes, headers["docker-content-digest"])
		if (isDigest(name) && digest !== name) fail("DIGEST_MISMATCH", `${where}: the bytes have the digest ${digest}`)
		return {bytes, digest, where, type: headers["content-type"] ?? "nothing named"}
	}
	async head(tagOrDigest) {
		const {headers, body} = await this.request("HEAD", "manifest", tagOrDigest)
		body?.resume()
		const digest = headers["docker-content-digest"]
		const size = Number(headers["content-length"] ?? 0)
		const type = headers["content-type"] ?? ""
		const mediaType = MANIFEST_TYPES.find(each => type.startsWith(each))
		return mediaType && isDigest(digest) && size > 0 ? {mediaType, digest, size} : void 0
	}
	async referrers(digest) {
		const pages = []
		let url = this.#urlOf("referrer", digest)
		while (url) {
			const page = await this.#page(digest, url)
			pages.push(page.bytes)
			if (pages.length > LIMITS.referrerPages)
				fail("TOO_LARGE", `${redactUrl(url)}: more than ${LIMITS.referrerPages} pages`)
			url = page.next
		}
		return pages
	}
	#page(digest, url) {
		return withRetries(this.#session, async () => {
			const {body, headers} = await this.request("GET", "referrer", digest, {url})
			const what = `the list of referrers ${redactUrl(url)}`
			const bytes = await readBody(body, LIMITS.manifestBytes, what)
			const json = parseJson(bytes)
			const isList = isRecord(json) && Array.isArray(json.manifests)
			if (!isList) fail("NOT_FOUND", `${what} is none`, {status: 404})
			return {bytes, ...dropEmpty({next: nextPage(headers.link, url)})}
		})
	}
	async request(method, kind, name, more = {}) {
		const {signal} = this.#session
		const request = {
			method,
			url: this.#urlOf(kind, name),
			signal,
			authorizationFor: origin => this.#authorizer.headerFor(origin),
			roleOf: origin => (origin === this.origin ? this.role : "other"),
			...more,
			headers: {
				Accept: PATHS[kind] === PATHS.manifest ? this.#manifestTypes : ANY_TYPE,
				...more.headers
			}
		}
		for (let round = 0; ; round += 1) {
			const answer = await this.#sendInTurn(request)
			if (answer.body) {
				this.#hasServed = true
				return answer
			}
			if (answer.status === 406 && request.headers.Accept !== ANY_TYPE) {
				this.#manifestTypes = ANY_TYPE
				return this.request(method, kind, name, more)
			}
			if (round === 3 || !(await this.#authorizer.canGoOnAfter(answer, kind)))
				throw await this.#refusal(answer, kind, name)
		}
	}
	async #sendInTurn(request) {
		const isFirst = this.#firstContact === void 0
		if (!isFirst) await this.#firstContact
		const sending = this.#session.transport.send(request).then(answer => {
			this.#authorizer.hear(answer)
			return answer
		})
		if (isFirst) this.#firstContact = sending.catch(ignore)
		return sending
	}
	async #refusal(answer, kind, name) {
		const who = answer.url.origin === this.origin ? `the ${this.role}` : STORAGE_HOST
		const error = statusError(answer, this.#session.clock.now(), who)
		const {code, status, message, retryAfterMs} = error
		if (code === "NOT_FOUND") {
			const missing = missingWords(answer, this.#reference, kind, name)
			const isPage = answer.headers["content-type"]?.includes("html")
			const doubt = isPage ? `: is ${this.#reference.host} a registry?` : ""
			return new ImgpullError(
				code,
				`no such ${missing}
  ${message}${doubt}`,
				{status}
			)
		}
		const isForGood = retryAfterMs === void 0
		const isAccess = code === "UNAUTHORIZED" || code === "FORBIDDEN"
		return isAccess && isForGood ? this.#authorizer.explain(error) : error
	}
}
var Budget = class {
	#bytes = 0
	add(document, reference) {
		this.#bytes += document.length
		this.check(reference)
	}
	check(reference) {
		const {documentBytes} = LIMITS
		if (this.#bytes <= documentBytes) return
		const most = formatBytes(documentBytes)
		fail("TOO_LARGE", `${formatReference(reference)}: manifests and configs are above ${most} in all`)
	}
}
var MirrorFaults = class {
	#outOfOrder = /* @__PURE__ */ new Set()
	#lost = /* @__PURE__ */ new Set()
	#told = /* @__PURE__ */ new Set()
	isOutOfOrder(mirror) {
		return this.#outOfOrder.has(mirror)
	}
	isLost(mirror) {
		return this.#lost.has(mirror)
	}
	note(mirror, error, hasServed) {
		if (MIRROR_WIDE.includes(error.code)) this.#outOfOrder.add(mirror)
		if (hasServed && isPassing(error)) this.#lost.add(mirror)
	}
	isFirst(mirror) {
		const isFirst = !this.#told.has(mirror)
		this.#told.add(mirror)
		return isFirst
	}
}
var MIRROR_WIDE = ["NETWORK", "TIMEOUT", "TLS", "PROXY", "RATE_LIMITED", "DIGEST_MISMATCH"]
var Registry = class {
	reference
	#session
	#mirrors
	#home
	#denials = /* @__PURE__ */ new Map()
	#passedOver = /* @__PURE__ */ new Set()
	#forgiven = 0
	#manifests = /* @__PURE__ */ new Map()
	#mirrorAnswers = /* @__PURE__ */ new Map()
	constructor(session, reference) {
		const mirrors = session.settings.mirrors.get(canonicalHost(reference.host)) ?? []
		this.#session = session
		this.reference = reference
		this.#mirrors = new Map(mirrors.map(mirror => [new Endpoint(session, reference, mirror), mirror]))
		this.#home = new Endpoint(session, reference)
	}
	get origin() {
		return this.#home.origin
	}
	get acceptsRanges() {
		return this.#first.acceptsRanges
	}
	giveUpRanges() {
		this.#first.giveUpRanges()
	}
	get #first() {
		return this.#usableMirrors()[0] ?? this.#home
	}
	#usableMirrors() {
		const {mirrorFaults} = this.#session
		const isUsable2 = ([endpoint, mirror]) => !this.#passedOver.has(endpoint) && !mirrorFaults.isOutOfOrder(mirror)
		return [...this.#mirrors].filter(isUsable2).map(([endpoint]) => endpoint)
	}
	manifest(tagOrDigest, check = ignore) {
		const known = isDigest(tagOrDigest) ? this.#manifests.get(tagOrDigest) : void 0
		if (known) return known
		const fetching = this.#fetchManifest(tagOrDigest, check)
		if (!isDigest(tagOrDigest)) return fetching
		this.#manifests.set(tagOrDigest, fetching)
		fetching.catch(() => this.#manifests.delete(tagOrDigest))
		return fetching
	}
	async #fetchManifest(tagOrDigest, check, kind = "manifest") {
		const ask = () =>
			this.#ask({kind, name: tagOrDigest}, async endpoint => {
				const fetched = await endpoint.manifest(tagOrDigest, kind)
				if (endpoint !== this.#home) check(fetched)
				return fetched
			})
		const manifest = await this.#withinBudget(ask)
		this.#manifests.set(manifest.digest, Promise.resolve(manifest))
		return manifest
	}
	async config({digest, size, data}) {
		if (data) return data
		const {bytes} = await this.#withinBudget(() => this.#smallBlob(digest, size))
		return bytes
	}
	async signature({digest, size, data}) {
		if (data) return data
		const {bytes} = await withRetries(this.#session, () => this.#smallBlob(digest, size))
		return bytes
	}
	#smallBlob(digest, size) {
		return this.#ask({kind: "blob", name: digest}, async endpoint => {
			const document = await endpoint.document("blob", digest, LIMITS.configBytes)
			const actual = document.bytes.length
			if (actual === size) return document
			return fail("SIZE_MISMATCH", `${document.where}: ${actual} bytes, not ${size}`)
		})
	}
	async #withinBudget(attempt) {
		const {budget} = this.#session
		budget.check(this.reference)
		const document = await withRetries(this.#session, attempt)
		budget.add(document.bytes, this.reference)
		return document
	}
	head(tagOrDigest) {
		const wanted = {kind: "manifest", name: tagOrDigest}
		return withRetries(this.#session, () => this.#ask(wanted, endpoint => endpoint.head(tagOrDigest)))
	}
	async referrers(digest) {
		const wanted = {kind: "referrer", name: digest}
		try {
			return await this.#ask(wanted, endpoint => endpoint.referrers(digest))
		} catch (error) {
			if (!isWithoutEndpoint(error)) throw error
			this.#noteDenial("referrer", error, "asking for the tag that stands for its list of referrers")
			return void 0
		}
	}
	async proof(tag) {
		try {
			return await this.#fetchManifest(tag, ignore, "proof")
		} catch (error) {
			const isAbsent = error instanceof ImgpullError && [401, 403, 404].includes(error.status ?? 0)
			if (!isAbsent) throw error
			this.#noteDenial("proof", error, "taken as not there")
			return void 0
		}
	}
	get denial() {
		return this.#denials.get("proof") ?? this.#denials.get("referrer")
	}
	#noteDenial(kind, {message, status}, outcome) {
		if (status === 404 || this.#denials.has(kind)) return
		this.#denials.set(kind, firstLineOf(message))
		this.#session.warn(`${firstLineOf(message)}; ${outcome}`)
	}
	async blob(descriptor, from, to, signal) {
		const {digest, size} = descriptor
		const isRanged = from > 0 || to < size
		const headers = isRanged ? {Range: `bytes=${from}-${to - 1}`} : {}
		const more = {headers, signal, isBlob: true}
		const isElsewhere = (descriptor.urls?.length ?? 0) > 0
		const wanted = {kind: "blob", name: digest, isRanged, isElsewhere}
		try {
			return await this.#ask(wanted, async (endpoint, isLastChance) => {
				const answer = await endpoint.request("GET", "blob", digest, more)
				const isMirrors = endpoint !== this.#home && !isLastChance
				if (isMirrors) this.#rememberAnswer(digest, endpoint)
				return answer
			})
		} catch (refusal) {
			const isMissing = refusal instanceof ImgpullError && refusal.code === "NOT_FOUND"
			if (!isMissing) throw refusal
			return this.#foreignBlob(descriptor, headers, signal, refusal)
		}
	}
	canAskElsewhere(digest, error) {
		if (!isMirrorsFailure(error)) return false
		const answers = this.#mirrorAnswers.get(digest) ?? []
		if (error.code === "DIGEST_MISMATCH") {
			for (const {mirror: mirror2} of answers) this.#passOver(mirror2, error)
			return this.#mirrorAnswers.delete(digest)
		}
		const failed = answers.findLast(({hasFailed}) => !hasFailed)
		if (!failed) return false
		failed.hasFailed = true
		const {mirror} = failed
		if (!this.#usableMirrors().includes(mirror)) return true
		if (this.#isForgiven(mirror, error)) return false
		this.#passOver(mirror, error)
		return true
	}
	#rememberAnswer(digest, mirror) {
		const answers = this.#mirrorAnswers.get(digest) ?? []
		answers.push({mirror, hasFailed: false})
		this.#mirrorAnswers.set(digest, answers)
	}
	async #ask(wanted, attempt) {
		for (const mirror of this.#usableMirrors()) {
			try {
				return await attempt(mirror)
			} catch (error) {
				if (!this.#canGoOnWithout(mirror, wanted, error)) throw error
			}
		}
		try {
			return await attempt(this.#home)
		} catch (refusal) {
			const isElsewhere = isProof(wanted.kind) || wanted.isElsewhere === true
			if (isElsewhere || !isMirrorsFailure(refusal)) throw refusal
			return this.#askLost(attempt, refusal)
		}
	}
	async #askLost(attempt, refusal) {
		const {mirrorFaults} = this.#session
		for (const [endpoint, mirror] of this.#mirrors) {
			if (!mirrorFaults.isLost(mirror)) continue
			try {
				return await attempt(endpoint, true)
			} catch (error) {
				if (!isMirrorsFailure(error) || isPassing(error)) throw error
			}
		}
		throw refusal
	}
	#canGoOnWithout(mirror, {kind, name, isRanged}, error) {
		if (!isMirrorsFailure(error)) return false
		const isMissing = error.code === "NOT_FOUND" || (isProof(kind) && isWithoutEndpoint(error))
		if (isMissing && mirror.hasServed) {
			const isExpected = !isProof(kind) && isDigest(name)
			if (isExpected) this.#tellOf(mirror, error)
			return true
		}
		if (isRanged && mirror.acceptsRanges && isRangeRefusal(error)) return false
		if (this.#isForgiven(mirror, error)) return false
		this.#passOver(mirror, error)
		return true
	}
	#isForgiven(mirror, error) {
		const most = Math.min(LIMITS.mirrorFailures, Math.floor(this.#session.settings.retries / 2))
		if (!mirror.hasServed || !isPassing(error) || this.#forgiven >= most) return false
		this.#forgiven += 1
		return true
	}
	#passOver(endpoint, error) {
		const mirror = this.#mirrors.get(endpoint)
		this.#passedOver.add(endpoint)
		if (mirror) this.#session.mirrorFaults.note(mirror, error, endpoint.hasServed)
		this.#tellOf(endpoint, error)
	}
	#tellOf(endpoint, {message}) {
		const {mirrorFaults, warn} = this.#session
		const mirror = this.#mirrors.get(endpoint)
		if (!mirror || !mirrorFaults.isFirst(mirror)) return
		const endpoints = [...this.#mirrors.keys()]
		const later = endpoints.slice(endpoints.indexOf(endpoint) + 1)
		const next = later.find(each => this.#usableMirrors().includes(each)) ?? this.#home
		warn(`the mirror ${endpoint.name}: ${firstLineOf(message)}; asking ${next.name} instead`)
	}
	async #foreignBlob({urls = []}, headers, signal, refusal) {
		let failure = refusal
		const mayAsk = url => url.protocol === "https:" && !leadsInside(url, this.origin)
		const usable = urls.filter(url => URL.canParse(url)).map(url => new ForeignUrl(url))
		for (const url of usable) {
			if (!mayAsk(url)) continue
			const answer = await this.#session.transport.send({
				method: "GET",
				url,
				headers,
				signal,
				isBlob: true,
				mayAsk,
				authorizationFor: async () => void 0,
				roleOf: () => "other"
			})
			if (answer.body) return answer
			failure = statusError(answer, this.#session.clock.now(), "the foreign layer's host")
		}
		throw failure
	}
}
var OUR_OWN = ["ABORTED", "DISK", "CREDENTIALS"]
var isMirrorsFailure = error => error instanceof ImgpullError && !OUR_OWN.includes(error.code)
var isPassing = error => !error.code.endsWith("MISMATCH") && retryDelayMs(error, 1, 1, 1) !== void 0
var isWithoutEndpoint = error =>
	error instanceof ImgpullError && [400, 401, 403, 404, 405, 406].includes(error.status ?? 0)
function isRangeRefusal(error) {
	if (!(error instanceof ImgpullError)) return false
	const {status = 0, retryAfterMs = 0} = error
	if ([401, 407, 408, 425, 429].includes(status)) return false
	return status >= 400 && retryAfterMs === 0
}
function nextPage(header, url) {
	const links = [header ?? []].flat().join(",")
	const [, target] = /<([^<>]*)>[^<]*;\s*rel="?next"?/i.exec(links) ?? []
	if (target === void 0) return void 0
	const next = URL.canParse(target, url) ? new ForeignUrl(target, url) : void 0
	if (next?.origin !== url.origin) return fail("PROTOCOL", `${redactUrl(url)}: its next page is on another host`)
	const namespace = url.searchParams.get("ns")
	if (namespace !== null) next.searchParams.set("ns", namespace)
	return next
}
function missingWords({words}, reference, kind, name) {
	const place = placeOf(reference)
	if (/NAME_UNKNOWN|repository name not known/i.test(words)) return `repository: ${place}`
	return isDigest(name) ? `${kind}: ${name}` : `tag: ${place}:${name}`
}
function digestByName(bytes, header) {
	const isRight = isDigest(header) && header === digestOf(bytes, header)
	return isRight ? header : digestOf(bytes)
}
function registryOf(session, reference) {
	const key = placeOf(reference)
	const registry = session.registries.get(key) ?? new Registry(session, reference)
	session.registries.set(key, registry)
	return registry
}
function sniffMediaType(bytes, contentType = "") {
	const json = parseJson(bytes)
	if (!isRecord(json)) return void 0
	if (typeof json.mediaType === "string") return json.mediaType
	if (json.schemaVersion === 1) return DOCKER_SCHEMA_1
	const named = MANIFEST_TYPES.find(type => contentType.toLowerCase().startsWith(type))
	if (named) return named
	if (Array.isArray(json.manifests)) return OCI_INDEX
	return isRecord(json.config) ? OCI_MANIFEST : void 0
}
var OLD_CONFIG_LABELS = ["", "text/html", "application/json", "application/octet-stream"]
function parseManifest({bytes, mediaType}, where) {
	const refuse = (code, reason) => fail(code, `${where}: ${reason}`)
	const json = parseJson(bytes)
	if (!isRecord(json)) return refuse("PROTOCOL", "the manifest is not a JSON object")
	const isSchema1 = json.schemaVersion === 1 || mediaType.startsWith(DOCKER_SCHEMA_1)
	if (isSchema1) refuse("UNSUPPORTED", "a schema 1 manifest, which Docker itself has given up: push the image anew")
	if (isAmbiguous(json, mediaType))
		refuse("PROTOCOL", `${outside(mediaType, 80)}: no manifest, or with fields of something else`)
	if (Array.isArray(json.manifests)) {
		if (json.manifests.length > LIMITS.indexEntries) refuse("TOO_LARGE", `more than ${LIMITS.indexEntries} entries`)
		const manifests = json.manifests.map(entry => parseDescriptor(entry, where))
		return {kind: "index", manifests}
	}
	const config = parseDescriptor(json.config, where)
	if (config.size > LIMITS.configBytes) refuse("TOO_LARGE", `its config is larger than ${LIMITS.configBytes} bytes`)
	const isOldLabel = mediaType === DOCKER_MANIFEST && OLD_CONFIG_LABELS.includes(config.mediaType)
	if (isOldLabel) config.mediaType = CONFIG_TYPES[0]
	const layers = (json.layers ?? []).map(layer => parseDescriptor(layer, where))
	const falselyEmpty = [config, ...layers].find(isFalselyEmpty)
	if (falselyEmpty) refuse("PROTOCOL", `${falselyEmpty.digest} is said to have no bytes, and is not their digest`)
	return {kind: "image", config, layers}
}
function isAmbiguous(json, mediaType) {
	const isIndex2 = Array.isArray(json.manifests)
	const hasLayers = Array.isArray(json.layers)
	const isImage2 = isRecord(json.config) && (hasLayers || (json.layers ?? null) === null)
	const isKnownType = MANIFEST_TYPES.includes(mediaType)
	const isOtherType = isKnownType && INDEX_TYPES.includes(mediaType) !== isIndex2
	return isIndex2 === isImage2 || (isIndex2 && hasLayers) || isOtherType
}
var isFalselyEmpty = ({digest, size}) => size === 0 && digestOf(Buffer.alloc(0), digest) !== digest
function parseDescriptor(value, where) {
	const refuse = reason => fail("PROTOCOL", `${where}: ${reason}`)
	if (!isRecord(value)) return refuse("a descriptor is not an object")
	const {mediaType, digest, size, urls, platform, annotations, data} = value
	if (!isDigest(digest)) return refuse(`${quote(digest)} is not a digest that is safe to use`)
	const isSize = typeof size === "number" && Number.isSafeInteger(size) && size >= 0
	if (!isSize) return refuse(`${digest} has the size ${quote(size)}, which is not a number of bytes`)
	const isUrlList = isStringList(urls) && urls.length > 0
	return {
		mediaType: typeof mediaType === "string" ? mediaType : "",
		digest,
		size,
		...dropEmpty({
			urls: isUrlList ? urls : void 0,
			platform: isRecord(platform) ? parsePlatform(platform) : void 0,
			annotations: isRecord(annotations) ? textsIn(annotations) : void 0,
			data: inlineContent(data, {digest, size})
		})
	}
}
function inlineContent(data, {digest, size}) {
	if (typeof data !== "string") return void 0
	const bytes = Buffer.from(data, "base64")
	return bytes.length === size && digestOf(bytes, digest) === digest ? bytes : void 0
}
var textsIn = value => Object.fromEntries(Object.entries(value).filter(entry => typeof entry[1] === "string"))
function quote(value) {
	const text = typeof value === "object" ? "an object" : (JSON.stringify(value) ?? "none")
	return outside(text, 100)
}
var LAYER_TYPE =
	/^application\/vnd\.(docker\.image\.rootfs(\.foreign)?\.diff\.tar(\.gzip|\.zstd)?|oci\.image\.layer(\.nondistributable)?\.v1\.tar(\+gzip|\+zstd)?(\+encrypted)?)$/
var isTarLayer = ({mediaType}) => LAYER_TYPE.test(mediaType)
function configWords(json) {
	if (!isRecord(json)) return {isObject: false, platform: "", diffIds: void 0}
	const {rootfs} = json
	const diffIds = isRecord(rootfs) ? rootfs.diff_ids : void 0
	const isList = Array.isArray(diffIds)
	return {
		isObject: true,
		platform: formatPlatform(parsePlatform(json)),
		diffIds: isList || diffIds === void 0 ? diffIds : [diffIds]
	}
}
var hasOneDiffIdEach = ({diffIds = []}, layerCount) => diffIds.length === layerCount && diffIds.every(isDigest)
var claimsImage = ({config, layers}) => CONFIG_TYPES.includes(config.mediaType) && layers.every(isTarLayer)
var isImage = (manifest, config) =>
	claimsImage(manifest) && (!config || hasOneDiffIdEach(config, manifest.layers.length))
var isImageContent = ({manifest, configBytes}) => isImage(manifest, configBytes && configWords(parseJson(configBytes)))
function parsePlatform(value) {
	const word = name => {
		const {[name]: text = ""} = value
		if (typeof text !== "string") return ""
		return text.length > 64 ? "…" : printable(text)
	}
	return {
		os: word("os"),
		architecture: word("architecture"),
		...dropEmpty({variant: word("variant")})
	}
}
function hostPlatform() {
	const {arch, platform} = process
	const ppc64 = os.endianness() === "LE" ? "ppc64le" : "ppc64"
	const systems = {win32: "windows", sunos: "solaris"}
	const processors = {x64: "amd64", ia32: "386", mipsel: "mipsle", ppc64}
	const {arm_version: version = "7"} = process.config.variables
	const variant = arch === "arm" ? `v${version}` : void 0
	return {
		os: systems[platform] ?? platform,
		architecture: processors[arch] ?? arch,
		...dropEmpty({variant})
	}
}
function wantedPlatform(wanted, host = hostPlatform()) {
	const variant = wanted.variant ?? (wanted.architecture === void 0 ? host.variant : void 0)
	return {
		os: wanted.os ?? host.os,
		architecture: wanted.architecture ?? host.architecture,
		...dropEmpty({variant})
	}
}
var VARIANT_LEVELS = {
	arm: {lowest: 5, unnamed: 7},
	arm64: {lowest: 8, unnamed: 8},
	amd64: {lowest: 1, unnamed: 1}
}
var NO_VARIANT = ""
var ANY_VARIANT = "*"
function acceptableVariants(architecture, variant) {
	const levels = VARIANT_LEVELS[architecture]
	if (!levels) return variant === void 0 ? [NO_VARIANT, ANY_VARIANT] : [variant]
	const exact = variant ?? NO_VARIANT
	const [, digits] = /^v(\d{1,2})$/.exec(variant ?? `v${levels.unnamed}`) ?? []
	if (digits === void 0) return [exact]
	const acceptable = [exact]
	for (let level = Number(digits); level >= levels.lowest; level -= 1) {
		acceptable.push(`v${level}`)
		if (level === levels.unnamed) acceptable.push(NO_VARIANT)
	}
	return acceptable
}
function matchPlatform(candidates, {os: system, architecture, variant}) {
	const fitting = candidates.filter(({platform}) => platform?.os === system && platform.architecture === architecture)
	for (const acceptable of acceptableVariants(architecture, variant)) {
		const match = fitting.find(
			({platform}) => acceptable === ANY_VARIANT || (platform?.variant ?? NO_VARIANT) === acceptable
		)
		if (match) return match
	}
	return void 0
}
var isAttestation = ({platform}) => platform?.os === "unknown" || platform?.architecture === "unknown"
var versionOf = ({tag, digest}) => digest ?? tag
async function resolveImage(session, reference, name, choice) {
	const where = formatReference(reference)
	const registry = registryOf(session, reference)
	const parse = manifest => parseManifest(manifest, where)
	const asked = await registry.manifest(versionOf(reference), parse)
	const parsed = parse(asked)
	const source = {registry, where, asked}
	const found = await findImages()
	const finalName = name.replace(/@.*$/, `@${found.top.digest}`)
	return {reference, registry, name: finalName, asked, ...found}
	async function findImages() {
		const readChild = childrenOf(registry, where)
		if (choice === "all") {
			const {concurrency} = session.settings
			const all = await collectAll(readChild, concurrency, where, asked)
			return {top: asked, platform: "all", ...all}
		}
		if (choice !== "one") return findImagesFor(session, source, choice)
		if (parsed.kind === "image") return findLoneImage(session, source, parsed)
		return findImageOfIndex(session, readChild, where, parsed)
	}
}
async function findLoneImage(session, {registry, where, asked: top}, manifest) {
	const isConfig = CONFIG_TYPES.includes(manifest.config.mediaType)
	const configBytes = isConfig ? await registry.config(manifest.config) : void 0
	const config = configBytes && parseJson(configBytes)
	if (configBytes && claimsImage(manifest) && !isRecord(config))
		fail("PROTOCOL", `${formatReference(registry.reference)}: its config is not a JSON object`)
	const platform = isRecord(config) && config.os ? parsePlatform(config) : void 0
	if (platform) checkPlatform(session, where, platform)
	const content = {manifest, ...dropEmpty({platform, configBytes})}
	return {top, manifests: [top], contents: [content], platform: formatPlatform(platform)}
}
function checkPlatform({settings, warn}, where, platform) {
	const {wanted} = settings
	const asked = {...platform, ...wanted}
	const entry = {mediaType: "", digest: "", size: 0, platform}
	const what = `it is one image, for ${outside(formatPlatform(platform))}`
	if (!matchPlatform([entry], asked))
		fail(
			"NO_PLATFORM",
			`${where} has no image for ${outside(formatPlatform(asked))}
  ${what}`
		)
	const host = wantedPlatform(wanted)
	const isForHost = platform.architecture === host.architecture && ["linux", host.os].includes(platform.os)
	if (!isForHost) warn(`${where}: ${what}, not for this machine`)
}
function childrenOf(registry, where) {
	const asked = /* @__PURE__ */ new Set()
	return async descriptor => {
		const {digest, size, data, mediaType} = descriptor
		asked.add(digest)
		if (asked.size > LIMITS.manifests)
			fail("TOO_LARGE", `${where}: its indexes name more than ${LIMITS.manifests} manifests`)
		if (data) return {digest, bytes: data, mediaType: sniffMediaType(data, mediaType) ?? mediaType}
		const child = await registry.manifest(digest)
		if (child.bytes.length === size) return child
		const actual = `${child.bytes.length} bytes, not ${size}`
		return fail("SIZE_MISMATCH", `${where}: ${digest} has ${actual}`)
	}
}
function checkLayers(contents, where) {
	if (sumOf(contents, ({manifest}) => manifest.layers.length) > LIMITS.layers)
		fail("TOO_LARGE", `${where}: more than ${LIMITS.layers} layers`)
}
function checkDepth(depth, where) {
	if (depth > LIMITS.indexDepth)
		fail("TOO_LARGE", `${where}: indexes inside indexes, more than ${LIMITS.indexDepth} deep`)
}
async function findImageOfIndex(session, readChild, where, index) {
	const entry = await findPlatform(session, readChild, where, index)
	const top = await readChild(entry)
	const manifest = parseManifest(top, where)
	if (manifest.kind !== "image") return fail("PROTOCOL", `${where}: ${top.digest} is an index, and not said to be`)
	const {platform} = entry
	const content = {manifest, ...dropEmpty({platform})}
	return {top, manifests: [top], contents: [content], platform: formatPlatform(platform)}
}
async function findPlatform(session, readChild, where, top) {
	const {settings, warn} = session
	const host = wantedPlatform(settings.wanted)
	const onLinux = settings.wanted.os === void 0 ? {...host, os: "linux"} : host
	const images = []
	let level = [top]
	for (let depth = 1; level.length > 0; depth += 1) {
		checkDepth(depth, where)
		const listed = level.flatMap(({manifests: manifests2}) => manifests2)
		const entries = listed.filter(entry => !isAttestation(entry) && isManifestType(entry))
		const nested = entries.filter(isIndex)
		images.push(...entries.filter(entry => !isIndex(entry)))
		const match = matchPlatform(images, host) ?? loneEntry(entries)
		if (match) return match
		const mayHold = nested.filter(
			entry => !entry.platform?.os || matchPlatform([entry], host) || matchPlatform([entry], onLinux)
		)
		const children = await mapConcurrently(mayHold, settings.concurrency, readChild)
		const manifests = children.map(child => parseManifest(child, where))
		level = manifests.filter(manifest => manifest.kind === "index")
	}
	const second = matchPlatform(images, onLinux)
	if (second) {
		warn(`${where} has nothing for ${host.os}: taking linux`)
		return second
	}
	const names = images.map(({platform}) => formatPlatform(platform)).filter(Boolean)
	const choices =
		names.length > 0
			? `it has: ${outside([...new Set(names)].join(", "), 1e3)} (\`platforms\`)`
			: "it has none for any platform, but cache or artifacts: `platforms` all takes them"
	return fail(
		"NO_PLATFORM",
		`${where} has no image for ${formatPlatform(host)}
  ${choices}`
	)
}
var isIndex = ({mediaType}) => INDEX_TYPES.includes(mediaType)
var isManifestType = ({mediaType}) =>
	mediaType === "" || MANIFEST_TYPES.includes(mediaType) || mediaType.startsWith(DOCKER_SCHEMA_1)
function loneEntry(entries) {
	const [entry] = entries
	if (entries.length !== 1 || !entry || isIndex(entry)) return void 0
	return formatPlatform(entry.platform) === "" ? entry : void 0
}
async function pathTo(digest, from, readChild, where) {
	return search(from, 0)
	async function search(fetched, depth) {
		checkDepth(depth, where)
		const manifest = parseManifest(fetched, where)
		if (manifest.kind === "image") return void 0
		if (manifest.manifests.some(entry => entry.digest === digest)) return [fetched]
		for (const entry of manifest.manifests.filter(isIndex)) {
			const child = await readChild(entry)
			const below2 = child && (await search(child, depth + 1))
			if (below2) return [fetched, ...below2]
		}
		return void 0
	}
}
async function findImagesFor(session, source, platforms) {
	const {registry, where, asked: top} = source
	const readChild = childrenOf(registry, where)
	const parsed = parseManifest(top, where)
	const found = await mapConcurrently(platforms, 1, wanted => {
		const wanting = {...session, settings: {...session.settings, wanted}}
		return parsed.kind === "image"
			? findLoneImage(wanting, source, parsed)
			: findImageOfIndex(wanting, readChild, where, parsed)
	})
	const images = new Map(found.map(image => [image.top.digest, image]))
	const entries = parsed.kind === "index" ? parsed.manifests.map(({digest}) => digest) : []
	const placed = await mapConcurrently([...images.values()], 1, async image => {
		const indexes = (await pathTo(image.top.digest, top, readChild, where)) ?? []
		return {...image, indexes, place: entries.indexOf((indexes[1] ?? image.top).digest)}
	})
	const ordered = placed.sort((left, right) => left.place - right.place)
	const kept = [top, ...ordered.flatMap(image => [...image.indexes, image.top])]
	const manifests = new Map(kept.map(each => [each.digest, each]))
	if (parsed.kind === "index") warnOfPartialIndex(session, where, parsed, manifests)
	const platform = ordered.map(image => image.platform).join(",")
	const contents = ordered.flatMap(image => image.contents)
	return {top, manifests: [...manifests.values()], contents, platform}
}
function warnOfPartialIndex({warn}, where, {manifests: entries}, kept) {
	const missing = entries.filter(({digest}) => !kept.has(digest))
	if (missing.length === 0) return
	const platforms = entries.filter(entry => !isAttestation(entry))
	const taken = platforms.filter(({digest}) => kept.has(digest))
	const without = missing.every(isAttestation) ? ", without their attestations" : ""
	warn(
		`${where}: ${taken.length} of ${counted(platforms.length, "platform")}${without}: ctr --all-platforms, skopeo --all and crane push of a folder want the whole index`
	)
}
async function collectAll(readChild, limit, where, top) {
	const manifests = /* @__PURE__ */ new Map([[top.digest, top]])
	const contents = []
	const blobs = []
	await collect(top, 0)
	contents.sort((left, right) => Number(isAttestation(left)) - Number(isAttestation(right)))
	return {manifests: [...manifests.values()], contents, blobs}
	async function collect(fetched, depth, platform) {
		checkDepth(depth, where)
		const {digest} = fetched
		const manifest = parseManifest(fetched, where)
		if (manifest.kind === "image") {
			contents.push({digest, manifest, ...dropEmpty({platform})})
			checkLayers(contents, where)
			return
		}
		blobs.push(...manifest.manifests.filter(entry => !isManifestType(entry)))
		const entries = manifest.manifests.filter(entry => isManifestType(entry) && !manifests.has(entry.digest))
		const children = await mapConcurrently(entries, limit, readChild)
		for (const [at, child] of children.entries()) {
			if (!child || manifests.has(child.digest)) continue
			manifests.set(child.digest, child)
			await collect(child, depth + 1, entries[at]?.platform)
		}
	}
}
var BLOCK = 512
var CHECKSUM_AT = 148
var CHECKSUM_BYTES = 8
var LARGEST_USTAR_SIZE = 8589934591
var LONGEST_USTAR_NAME = 100
var paddingOf = sizeBytes => (BLOCK - (sizeBytes % BLOCK)) % BLOCK
function checksumOf(header) {
	let sum = CHECKSUM_BYTES * 32
	for (let at = 0; at < BLOCK; at += 1) {
		const isChecksum = at >= CHECKSUM_AT && at < CHECKSUM_AT + CHECKSUM_BYTES
		if (!isChecksum) sum += header[at] ?? 0
	}
	return sum
}
function encodeUstarHeader(name, sizeBytes, type) {
	const octal = (value, digits) => value.toString(8).padStart(digits, "0")
	const fields = [
		[100, name],
		[8, octal(type === "5" ? 493 : 420, 7)],
		[8, octal(0, 7)],
		[8, octal(0, 7)],
		[12, octal(sizeBytes, 11)],
		[12, octal(0, 11)],
		[CHECKSUM_BYTES, ""],
		[1, type],
		[100, ""],
		[6, "ustar"],
		[2, "00"],
		[32, ""],
		[32, ""],
		[8, octal(0, 7)],
		[8, octal(0, 7)],
		[155, ""]
	]
	const header = Buffer.alloc(BLOCK)
	let offset = 0
	for (const [widthBytes, text] of fields) {
		header.write(text, offset, "latin1")
		offset += widthBytes
	}
	header.write(`${octal(checksumOf(header), 6)}\0 `, CHECKSUM_AT, "latin1")
	return header
}
function encodePaxRecord(key, value) {
	const rest = ` ${key}=${value}
`
	const withGuess = rest.length + String(rest.length).length
	return `${rest.length + String(withGuess).length}${rest}`
}
function encodeTarHeader(name, sizeBytes) {
	const isLong = name.length > LONGEST_USTAR_NAME
	const isLarge = sizeBytes > LARGEST_USTAR_SIZE
	const shortName = name.slice(0, LONGEST_USTAR_NAME)
	const type = name.endsWith("/") ? "5" : "0"
	const header = encodeUstarHeader(shortName, isLarge ? 0 : sizeBytes, type)
	if (!isLong && !isLarge) return header
	const records = [
		isLong ? encodePaxRecord("path", name) : "",
		isLarge ? encodePaxRecord("size", String(sizeBytes)) : ""
	].join("")
	const extension = Buffer.alloc(records.length + paddingOf(records.length))
	extension.write(records, "latin1")
	return Buffer.concat([encodeUstarHeader("PaxHeaders/blob", records.length, "x"), extension, header])
}
var blobPath = digest => `blobs/${digest.replace(":", "/")}`
var NAME_KEYS = ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
function indexEntry({name, top, kind}) {
	const names = Object.fromEntries(NAME_KEYS.map(key => [key, name]))
	const annotations = {...names, ...dropEmpty({kind})}
	return {mediaType: top.mediaType, digest: top.digest, size: top.bytes.length, annotations}
}
function dockerImageOf({contents}) {
	const images = contents.filter(isImageContent)
	const usual = images.find(({platform}) => formatPlatform(platform) === "linux/amd64")
	return usual ?? images[0]
}
function dockerEntry(image) {
	const chosen = dockerImageOf(image)
	if (!chosen) return void 0
	const {config, layers} = chosen.manifest
	return {
		Config: blobPath(config.digest),
		RepoTags: image.name.includes("@") ? [] : [image.name],
		Layers: layers.map(({digest}) => blobPath(digest))
	}
}
function parseDockerEntry(value) {
	if (!isRecord(value)) return void 0
	const {Config: config, RepoTags, Layers} = value
	const tags = RepoTags ?? []
	const layers = Layers ?? []
	if (typeof config !== "string" || !isStringList(tags) || !isStringList(layers)) return void 0
	return {config, tags, layers}
}
var PlannedFiles = class {
	files = /* @__PURE__ */ new Map()
	omitted = /* @__PURE__ */ new Map()
	addBytes(name, bytes) {
		this.files.set(name, {sizeBytes: bytes.length, bytes})
	}
	addBlob(blob, bytes = blob.descriptor.data) {
		const {digest, size} = blob.descriptor
		const name = blobPath(digest)
		const planned = this.files.get(name)
		const plannedBytes = planned?.sizeBytes ?? size
		if (plannedBytes !== size)
			fail("SIZE_MISMATCH", `${digest} is said to have ${size} bytes here, ${plannedBytes} there`)
		if (planned) return
		if (bytes) this.addBytes(name, bytes)
		else this.files.set(name, {sizeBytes: size, blob})
	}
	addImage(image, omit) {
		const {registry, manifests, contents, blobs = []} = image
		for (const {digest, bytes} of manifests) this.addBytes(blobPath(digest), bytes)
		for (const descriptor of blobs) this.addBlob({descriptor, registry})
		for (const {manifest, configBytes} of contents) {
			this.addBlob({descriptor: manifest.config, registry}, configBytes)
			for (const descriptor of manifest.layers) {
				const isPlanned = this.files.has(blobPath(descriptor.digest))
				if (omit.has(descriptor.digest) && !isPlanned) this.omitted.set(descriptor.digest, descriptor)
				else this.addBlob({descriptor, registry})
			}
		}
	}
}
function planTar(images, omit = /* @__PURE__ */ new Set(), extras = {}) {
	const planned = new PlannedFiles()
	const manifests = [...images.map(indexEntry), ...(extras.indexEntries ?? [])]
	const listed = images.map(dockerEntry).filter(entry => entry !== void 0)
	planned.addBytes("oci-layout", encodeJson({imageLayoutVersion: "1.0.0"}))
	planned.addBytes("index.json", encodeJson({schemaVersion: 2, mediaType: OCI_INDEX, manifests}))
	planned.addBytes("manifest.json", encodeJson(listed))
	for (const image of images) planned.addImage(image, omit)
	for (const {digest, bytes} of extras.documents ?? []) planned.addBytes(blobPath(digest), bytes)
	for (const blob of extras.blobs ?? []) planned.addBlob(blob)
	return {...layOut(withFolders(planned.files)), omitted: [...planned.omitted.values()]}
}
function withFolders(files) {
	const algorithms = [...files.keys()].flatMap(name => /^blobs\/\w+\//.exec(name) ?? [])
	const folders = /* @__PURE__ */ new Set(["blobs/", "blobs/sha256/", ...algorithms.sort()])
	const nothing = {sizeBytes: 0}
	return new Map([...[...folders].map(name => [name, nothing]), ...files])
}
function layOut(files) {
	const entries = []
	const identity = newHash("sha256:")
	let offset = 0
	let blobBytes = 0
	for (const [name, content] of files) {
		const padding = Buffer.alloc(paddingOf(offset))
		const lead = Buffer.concat([padding, encodeTarHeader(name, content.sizeBytes)])
		offset += lead.length
		entries.push({name, lead, offset, ...content})
		identity.update(lead).update(content.bytes ?? "")
		if (content.blob) blobBytes += content.sizeBytes
		offset += content.sizeBytes
	}
	const trailer = Buffer.alloc(paddingOf(offset) + 2 * BLOCK)
	const sizeBytes = offset + trailer.length
	return {entries, trailer, sizeBytes, blobBytes, id: identity.digest("hex")}
}
var refuseTar = reason => fail("BAD_TAR", reason)
function untilNul(bytes) {
	const end = bytes.indexOf(0)
	return bytes.toString("utf8", 0, end < 0 ? bytes.length : end)
}
var LINE_END = 10
var SPACE = 32
var DIGIT_0 = 48
var DIGIT_7 = 55
function readTarNumber(header, offset, widthBytes) {
	const isBinary = ((header[offset] ?? 0) & 128) !== 0
	if (isBinary) return readBinaryNumber(header.subarray(offset, offset + widthBytes))
	const isBlank = at2 => header[at2] === SPACE || header[at2] === 0
	let at = offset
	let end = offset + widthBytes
	while (at < end && isBlank(at)) at += 1
	while (at < end && isBlank(end - 1)) end -= 1
	let value = 0
	for (; at < end && header[at] !== 0; at += 1) {
		const digit = header[at] ?? 0
		if (digit < DIGIT_0 || digit > DIGIT_7) refuseTar("a number in a header is not octal")
		value = value * 8 + digit - DIGIT_0
	}
	return value
}
function readBinaryNumber(field) {
	const first = field[0] ?? 0
	let value = (first & 63) - (first & 64)
	for (const byte of field.subarray(1)) value = value * 256 + byte
	if (Math.abs(value) >= 2 ** 63) refuseTar("a number in a header is too large")
	return value
}
var PAX_KEYS = [
	"path",
	"linkpath",
	"size",
	"GNU.sparse.major",
	"GNU.sparse.minor",
	"GNU.sparse.name",
	"GNU.sparse.realsize",
	"GNU.sparse.size",
	"GNU.sparse.numblocks",
	"GNU.sparse.map",
	"GNU.sparse.offset",
	"GNU.sparse.numbytes"
]
function paxRecordAt(body, at) {
	const refuse = () => refuseTar("a pax record is malformed")
	const space = body.indexOf(SPACE, at)
	if (space < 0 || space > at + 10) return refuse()
	const digits = body.toString("latin1", at, space)
	const end = at + Number(digits)
	const equals = body.indexOf("=", space)
	const hasKey = equals > space + 1 && equals < end
	const isWhole = /^\d+$/.test(digits) && end <= body.length && body[end - 1] === LINE_END
	if (!hasKey || !isWhole) return refuse()
	const key = body.toString("utf8", space + 1, equals)
	return {key, value: body.subarray(equals + 1, end - 1), end}
}
var PAX_NUMBER = /^[+-]?\d{1,18}$/
var PAX_TIME = /^[+-]?\d{1,18}(\.\d*)?$/
var PAX_NUMBERS = {
	uid: PAX_NUMBER,
	gid: PAX_NUMBER,
	mtime: PAX_TIME,
	atime: PAX_TIME,
	ctime: PAX_TIME
}
function isPaxRecord(key, value) {
	const isText = PAX_KEYS.includes(key) || key === "uname" || key === "gname"
	if (isText ? value.includes(0) : key.includes("\0")) return false
	const form = Object.hasOwn(PAX_NUMBERS, key) ? PAX_NUMBERS[key] : void 0
	return !form || value.length === 0 || form.test(value.toString("latin1"))
}
var XATTR_KEY = "SCHILY.xattr."
function faultOfAttribute(name, value) {
	const isLong = Buffer.byteLength(name) > LIMITS.unpackedNameBytes
	if (isLong || name === "" || /^(user|trusted|security)\.$/.test(name)) return "for-none"
	const version = {20: 2, 24: 3}[value.length]
	const isCapability = name !== "security.capability" || (version !== void 0 && value[3] === version)
	const isAcl = !name.startsWith("system.posix_acl_") || (value.length % 8 === 4 && value[0] === 2)
	if (!isCapability || !isAcl) return "for-none"
	return name.startsWith("user.") ? "for-files" : void 0
}
function parsePaxRecords(body, onRecord) {
	const records = /* @__PURE__ */ new Map()
	const sparsePieces = []
	const faults = /* @__PURE__ */ new Set()
	let attributeBytes = 0
	for (let at = 0; at < body.length; ) {
		const {key, value, end} = paxRecordAt(body, at)
		at = end
		onRecord()
		if (!isPaxRecord(key, value)) refuseTar("a pax record is malformed")
		if (key.startsWith(XATTR_KEY)) {
			attributeBytes += key.length + value.length
			faults.add(faultOfAttribute(key.slice(XATTR_KEY.length), value))
		}
		if (!PAX_KEYS.includes(key)) continue
		const piece = ["GNU.sparse.offset", "GNU.sparse.numbytes"].indexOf(key)
		if (piece < 0) records.set(key, value.toString("utf8"))
		else if (piece === sparsePieces.length % 2) sparsePieces.push(value.toString("utf8"))
		else refuseTar("the map of a sparse file is wrong")
	}
	if (sparsePieces.length > 0) records.set("GNU.sparse.map", sparsePieces.join(","))
	if (attributeBytes > LIMITS.attributeBytes) faults.add("for-none")
	const fault = ["for-none", "for-files"].find(each => faults.has(each))
	if (fault) records.set(XATTR_KEY, fault)
	return records
}
function sparseMapOf(numbers, realBytes, storedBytes) {
	const pieces = []
	let before = 0
	for (let at = 0; at + 1 < numbers.length; at += 2) {
		const [from = 0, length = 0] = numbers.slice(at, at + 2)
		const isInOrder = Number.isSafeInteger(from + length) && from >= before && length >= 0
		if (!isInOrder || from + length > realBytes) refuseTar("the map of a sparse file is wrong")
		if (length > 0) pieces.push([from, from + length])
		before = from + length
	}
	const isAll = sumOf(pieces, ([from, to]) => to - from) === storedBytes
	if (numbers.length % 2 > 0 || !isAll) refuseTar("the map of a sparse file is wrong")
	return {realBytes, pieces}
}
function sparseFormOf(records) {
	const keys = [...records.keys()].filter(key => key.startsWith("GNU.sparse."))
	if (keys.length === 0) return void 0
	const [major = "", minor = ""] = ["major", "minor"].map(each => records.get(`GNU.sparse.${each}`))
	const version = `${major}.${minor}`
	if (version === "1.0") return "before-content"
	const hasMap = version === "." && Boolean(records.get("GNU.sparse.map"))
	if (version === "0.0" || version === "0.1" || hasMap) return "in-record"
	return refuseTar("a sparse file in it is of a form that is not known")
}
function decimalOf(digits) {
	if (!/^\d+$/.test(digits ?? "")) refuseTar("the map of a sparse file is wrong")
	return Number(digits)
}
var TarDecoder = class {
	wantedBytes = BLOCK
	isAtEnd = false
	hasTrailer = false
	globalHeaders = 0
	recordCount = 0
	#records = /* @__PURE__ */ new Map()
	#longNames = /* @__PURE__ */ new Map()
	#continuation
	take(bytes) {
		const continuation = this.#continuation
		this.#continuation = void 0
		this.wantedBytes = BLOCK
		return continuation ? continuation(bytes) : this.#takeHeader(bytes)
	}
	#expect(wantedBytes, continuation) {
		this.wantedBytes = wantedBytes
		this.#continuation = continuation
	}
	#takeHeader(block) {
		if (block[0] === 0 && block.every(byte => byte === 0)) {
			this.isAtEnd = this.hasTrailer
			this.hasTrailer = true
			return void 0
		}
		if (this.hasTrailer) refuseTar("it goes on after the block of zeros that ends it")
		if (statedChecksum(block) !== checksumOf(block)) refuseTar("it is not a tar, or is damaged (a header's checksum)")
		const numberFields = [100, 108, 116, ...(isUstar(block) ? [329, 337] : [])]
		for (const offset of numberFields) readTarNumber(block, offset, 8)
		for (const offset of [136, ...timesOf(block)]) readTarNumber(block, offset, 12)
		const sizeBytes = readTarNumber(block, 124, 12)
		const type = String.fromCharCode(block[156] || DIGIT_0)
		if ("xgLK".includes(type)) return this.#takeExtension(type, sizeBytes)
		return this.#takeEntry(block, type, sizeBytes)
	}
	#takeExtension(type, sizeBytes) {
		if (sizeBytes < 0 || sizeBytes > LIMITS.tarExtensionBytes) refuseTar("an extended header is too large")
		const use = body => {
			const content = body.subarray(0, sizeBytes)
			const records = "xg".includes(type) ? this.#readRecords(content) : /* @__PURE__ */ new Map()
			if (type === "x") this.#records = records
			if (type === "g") this.#forgetExtensions()
			if (type === "g") this.globalHeaders += 1
			if (type === "L") this.#longNames.set("path", untilNul(content))
			if (type === "K") this.#longNames.set("linkpath", untilNul(content))
		}
		if (sizeBytes === 0) return use(Buffer.alloc(0))
		return this.#expect(sizeBytes + paddingOf(sizeBytes), use)
	}
	#readRecords(content) {
		return parsePaxRecords(content, () => {
			this.recordCount += 1
			if (this.recordCount > LIMITS.paxRecords)
				refuseTar(`its extended headers have more than ${LIMITS.paxRecords} records`)
		})
	}
	#forgetExtensions() {
		this.#records = /* @__PURE__ */ new Map()
		this.#longNames = /* @__PURE__ */ new Map()
	}
	#takeEntry(block, type, headerBytes) {
		const records = this.#records
		const longNames = this.#longNames
		this.#forgetExtensions()
		const sparseForm = type === "S" ? void 0 : sparseFormOf(records)
		const name =
			(sparseForm && records.get("GNU.sparse.name")) ||
			longNames.get("path") ||
			records.get("path") ||
			headerName(block)
		const linkName = longNames.get("linkpath") || records.get("linkpath") || untilNul(block.subarray(157, 257))
		if (Math.max(name.length, linkName.length) > LIMITS.tarNameBytes) refuseTar("a name in it is too long")
		const storedBytes = contentBytes(records, headerBytes)
		const isFolder = type === "5" || (block[156] === 0 && name.endsWith("/"))
		const isEmpty = isFolder || "123456".includes(type)
		const attributes = records.get(XATTR_KEY)
		const header = {
			name,
			isRooted: name.startsWith("/"),
			sizeBytes: isEmpty ? 0 : storedBytes,
			type: isFolder ? "5" : type,
			linkName,
			attributes
		}
		if (type === "S") return this.#takeOldSparse(block, header)
		return sparseForm ? this.#takePaxSparse(sparseForm, records, header) : header
	}
	#takePaxSparse(form, records, header) {
		if ("123456".includes(header.type)) refuseTar("a sparse file in it is no file")
		const realBytes = decimalOf(records.get("GNU.sparse.size") || records.get("GNU.sparse.realsize"))
		if (form === "before-content") return this.#takeNewSparse(realBytes, header)
		const map = records.get("GNU.sparse.map") || void 0
		const numbers = map?.split(",").map(decimalOf) ?? []
		if (numbers.length !== 2 * decimalOf(records.get("GNU.sparse.numblocks")))
			refuseTar("the map of a sparse file is wrong")
		return {...header, holes: sparseMapOf(numbers, realBytes, header.sizeBytes)}
	}
	#takeOldSparse(block, header) {
		if (!isGnu(block)) refuseTar("the map of a sparse file is wrong")
		const numbers = []
		const realBytes = readTarNumber(block, 483, 12)
		const takePieces = (from, offset, count) => {
			const end = offset + count * 24
			for (let at = offset; at < end && from[at] !== 0; at += 24)
				numbers.push(readTarNumber(from, at, 12), readTarNumber(from, at + 12, 12))
			const isContinued = (from[end] ?? 0) !== 0
			if (!isContinued) return {...header, holes: sparseMapOf(numbers, realBytes, header.sizeBytes)}
			if (numbers.length * 12 > LIMITS.tarExtensionBytes) refuseTar("the map of a sparse file is too large")
			return this.#expect(BLOCK, more => takePieces(more, 0, 21))
		}
		return takePieces(block, 386, 4)
	}
	#takeNewSparse(realBytes, header) {
		let text = ""
		let lineCount = 0
		let wantedLines = 1
		const takeLines = block => {
			text += block.toString("latin1")
			lineCount += block.filter(byte => byte === LINE_END).length
			if (text.length > LIMITS.tarExtensionBytes) refuseTar("the map of a sparse file is too large")
			if (lineCount > 0 && wantedLines === 1) wantedLines += 2 * decimalOf(text.slice(0, text.indexOf("\n")))
			if (lineCount < wantedLines) return this.#expect(BLOCK, takeLines)
			const numbers = text.split("\n").slice(1, wantedLines).map(decimalOf)
			const sizeBytes = header.sizeBytes - text.length
			return {...header, sizeBytes, holes: sparseMapOf(numbers, realBytes, sizeBytes)}
		}
		return this.#expect(BLOCK, takeLines)
	}
}
function statedChecksum(block) {
	const text = block.toString("latin1", CHECKSUM_AT, CHECKSUM_AT + CHECKSUM_BYTES)
	const [, digits] = /^[ \0]*([0-7]+)(?:\0.*|[ \0]*)$/s.exec(text) ?? []
	return digits === void 0 ? void 0 : Number.parseInt(digits, 8)
}
function contentBytes(records, headerBytes) {
	const text = records.get("size") || String(headerBytes)
	const sizeBytes = /^\d+$/.test(text) ? Number(text) : -1
	if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 0) refuseTar("an entry's size is not a number")
	return sizeBytes
}
var isUstar = block => block.toString("latin1", 257, 262) === "ustar"
var isGnu = block => block.toString("latin1", 257, 265) === "ustar  \0"
var isStar = block => block.toString("latin1", 257, 263) === "ustar\0" && block.toString("latin1", 508, 512) === "tar\0"
function timesOf(block) {
	if (isGnu(block)) return [345, 357].filter(offset => block[offset] !== 0)
	return isStar(block) ? [476, 488] : []
}
function headerName(block) {
	const name = untilNul(block.subarray(0, 100))
	const isPosix = block.toString("latin1", 257, 263) === "ustar\0"
	const prefix = isPosix ? untilNul(block.subarray(345, isStar(block) ? 476 : 500)) : ""
	return prefix === "" ? name : `${prefix}/${name}`
}
async function readAt(handle, position, length) {
	const buffer = Buffer.allocUnsafe(length)
	let filled = 0
	while (filled < length) {
		const from = position === "here" ? null : position + filled
		const {bytesRead} = await handle.read(buffer, filled, length - filled, from)
		if (bytesRead === 0) break
		filled += bytesRead
	}
	return buffer.subarray(0, filled)
}
async function* readPlace(handle, from, to) {
	for (let at = from; at < to; at += TUNING.batchBytes) {
		const length = Math.min(TUNING.batchBytes, to - at)
		const piece = await readAt(handle, at, length)
		if (piece.length < length) fail("DISK", "a file became shorter while it was read")
		yield piece
	}
}
var entryAt = (header, offset) => ({
	name: resolveName(header.name),
	isRooted: header.isRooted,
	sizeBytes: header.sizeBytes,
	type: header.type,
	linkName: header.linkName,
	holes: header.holes,
	attributes: header.attributes,
	offset
})
var cutWithin = (what, position) => `it ends at byte ${position}, in the middle of ${what}: it was cut off`
function takeAt(decoder, bytes, position) {
	try {
		return decoder.take(bytes)
	} catch (error) {
		const isRefusal2 = error instanceof ImgpullError && error.code === "BAD_TAR"
		throw isRefusal2 ? new ImgpullError("BAD_TAR", `${error.message}, at byte ${position}`) : error
	}
}
async function* readTar(handle, where, decoder = new TarDecoder()) {
	const {size} = await handle.stat()
	let ahead = Buffer.alloc(0)
	let aheadAt = 0
	const read = async (position, length) => {
		if (position < aheadAt || position + length > aheadAt + ahead.length) {
			ahead = await readAt(handle, position, Math.max(length, TUNING.headerReadBytes))
			aheadAt = position
		}
		return ahead.subarray(position - aheadAt, position - aheadAt + length)
	}
	try {
		for (let position = 0; position < size && !decoder.isAtEnd; ) {
			const wantedBytes = decoder.wantedBytes
			const bytes = await read(position, wantedBytes)
			if (bytes.length < wantedBytes) refuseTar(cutWithin("a header", size))
			const header = takeAt(decoder, bytes, position)
			position += wantedBytes
			if (!header) continue
			if (position + header.sizeBytes > size) refuseTar(cutWithin(resolveName(header.name), size))
			yield entryAt(header, position)
			position += header.sizeBytes + paddingOf(header.sizeBytes)
		}
	} catch (error) {
		const isRefusal2 = error instanceof ImgpullError && error.code === "BAD_TAR"
		throw isRefusal2 ? new ImgpullError("BAD_TAR", `${where}: ${error.message}`) : error
	}
}
var resolveName = name =>
	name
		.split("/")
		.filter(part => part !== "" && part !== ".")
		.join("/")
var TarNames = class {
	entries = /* @__PURE__ */ new Map()
	#folders = /* @__PURE__ */ new Set()
	#nameBytes = 0
	add(entry) {
		const {name, type} = entry
		const isFolder = type === "5"
		if (name.split("/").includes("..")) return {kind: "step-up", entry: name}
		if (!isFolder && (this.entries.has(name) || this.#folders.has(name))) return {kind: "name-twice", entry: name}
		if (isFolder && (this.entries.get(name)?.type ?? "5") !== "5") return {kind: "name-twice", entry: name}
		this.#nameBytes += name.length + entry.linkName.length
		const isFull = this.entries.size >= LIMITS.tarEntries || this.#nameBytes > LIMITS.tarNamesBytes
		if (isFull) return {kind: "too-many-entries"}
		for (let folder = parentOf(name); folder !== ""; folder = parentOf(folder)) {
			if (this.#folders.has(folder)) break
			if (this.#folders.size >= LIMITS.tarFolders) return {kind: "too-many-entries"}
			if (this.entries.has(folder) && this.entries.get(folder)?.type !== "5")
				return {kind: "below-no-folder", entry: name}
			this.#folders.add(folder)
		}
		this.entries.set(name, entry)
		return void 0
	}
	file(rawName) {
		const name = resolveName(rawName)
		const {type = "", linkName = ""} = this.entries.get(name) ?? {}
		if (type === "2" && linkName.startsWith("/")) return void 0
		const isLink = type === "1" || type === "2"
		const folder = type === "2" ? path.posix.dirname(name) : ""
		const target = isLink ? resolveName(path.posix.join(folder, linkName)) : name
		const entry = this.entries.get(target)
		return entry && "0S".includes(entry.type) ? entry : void 0
	}
}
var parentOf = name => name.slice(0, Math.max(0, name.lastIndexOf("/")))
function digestInName(name) {
	const form = /^(?:blobs\/(sha\d+\/[0-9a-f]+)|(?:sha256:)?([0-9a-f]{64})(?:\.json|\.tar|\.tar\.gz)?)$/
	const [, blob, bare] = form.exec(name) ?? []
	const digest = blob?.replace("/", ":") ?? `sha256:${bare}`
	return isDigest(digest) ? digest : void 0
}
var PACKING_MAGIC = [
	["gzip", /^1f8b/],
	["zstd", /^(28b52ffd|5.2a4d18)/],
	["xz", /^fd377a585a00/],
	["bzip2", /^425a68/]
]
var ZSTD_FRAME = 40
function packingOf(bytes) {
	const hex = bytes.toString("hex", 0, 6)
	return PACKING_MAGIC.find(([, magic]) => magic.test(hex))?.[0]
}
async function openTarFile(file) {
	const handle = await onDisk(`cannot read ${file}`, fs.open(file, O_RDONLY | O_NONBLOCK))
	const names = new TarNames()
	const blobs = /* @__PURE__ */ new Map()
	try {
		if (!(await handle.stat()).isFile()) fail("BAD_TAR", `${file}: it is not a file`)
		const packing = packingOf(await readAt(handle, 0, BLOCK))
		if (packing) fail("BAD_TAR", `${file}: it is not a tar, but compressed (${packing}): unpack it first`)
		for await (const entry of readTar(handle, file)) {
			const problem = names.add(entry)
			if (problem) fail("BAD_TAR", `${file}: ${problemWords(problem)}`)
			const digest = digestInName(entry.name)
			if (digest !== void 0 && entry.type === "0" && !entry.holes) blobs.set(digest, entry)
		}
		return {handle, names, blobs}
	} catch (error) {
		await handle.close()
		throw error
	}
}
async function isIntact({handle, offset}, {digest, size}, signal) {
	const hash = newHash(digest)
	for await (const piece of readPlace(handle, offset, offset + size)) {
		signal?.throwIfAborted()
		hash.update(piece)
	}
	return hash.digest("hex") === hexOf(digest)
}
function chainsOf(list) {
	const images = Array.isArray(list) ? list.map(parseDockerEntry) : []
	return images.map(image => (image?.layers ?? []).map(layer => digestInName(layer) ?? ""))
}
async function dockerChains({handle, names}) {
	const entry = names.file("manifest.json")
	if (!entry || entry.holes || entry.sizeBytes > LIMITS.tarMetadataBytes) return []
	return chainsOf(parseJson(await readAt(handle, entry.offset, entry.sizeBytes)))
}
function layersToOmit(images, chains) {
	const omitted = /* @__PURE__ */ new Set()
	const needed = /* @__PURE__ */ new Set()
	for (const content of images.flatMap(({contents}) => contents)) {
		const layers = content.manifest.layers.map(({digest}) => digest)
		const sharedCounts = chains.map(chain => {
			const end = layers.findIndex((digest, at) => digest !== chain[at])
			return end < 0 ? layers.length : end
		})
		const sharedCount = isImageContent(content) ? Math.max(0, ...sharedCounts) : 0
		for (const digest of layers.slice(0, sharedCount)) omitted.add(digest)
		for (const digest of layers.slice(sharedCount)) needed.add(digest)
	}
	return new Set([...omitted].filter(digest => !needed.has(digest)))
}
function problemWords(problem) {
	const entry = "entry" in problem ? printable(problem.entry) : ""
	switch (problem.kind) {
		case "unreadable":
			return problem.reason
		case "cut-off":
			return `its end is missing: it was cut off at byte ${problem.atByte}`
		case "too-many-entries":
			return `it has more than ${LIMITS.tarEntries} entries, or too long names`
		case "too-many-references":
			return `its images name more than ${LIMITS.tarReferences} manifests and layers`
		case "name-twice":
			return `two entries are called ${entry}`
		case "step-up":
			return `the name ${entry} leads through ..`
		case "below-no-folder":
			return `${entry} lies below something that is no folder`
		case "damaged":
			return `${entry} is damaged`
		case "missing":
			return `${entry} is missing (a tar made with \`since\` needs its base)`
		case "size":
			return `${entry} has ${problem.actualBytes} bytes, not ${problem.expectedBytes}`
		case "document":
			return `${entry} ${problem.reason}`
		case "malformed":
			return `${entry}: ${problem.reason}`
		case "nothing-here":
			return `${entry} names nothing that is here`
		case "diff-ids":
			return `${entry} has not one diff_id for each layer`
		case "diff-id":
			return `${entry} does not unpack to ${problem.diffId}, its diff_id`
		case "unpacks-without-end":
			return `${entry} unpacks to more than ${LIMITS.unpackFactor} times its size`
		case "no-image":
			return "it holds no image: neither index.json nor manifest.json names one"
	}
}
var lengthOf = ranges => sumOf(ranges, ([from, to]) => to - from)
function addRange(ranges, [from, to]) {
	const before = []
	const behind = []
	let start = from
	let end = to
	for (const range of ranges) {
		if (range[1] < from) {
			before.push(range)
		} else if (range[0] > to) {
			behind.push(range)
		} else {
			start = Math.min(start, range[0])
			end = Math.max(end, range[1])
		}
	}
	return [...before, [start, end], ...behind]
}
function missingRanges(ranges, [from, to]) {
	const missing = []
	let at = from
	for (const [start, end] of ranges) {
		if (start >= to) break
		if (start > at) missing.push([at, start])
		at = Math.max(at, end)
	}
	if (at < to) missing.push([at, to])
	return missing
}
var nothingOf = digest => ({
	hash: newHash(digest),
	hashedTo: 0,
	config: [],
	come: [],
	inPlace: [],
	unrecordedBytes: 0,
	resumedBytes: 0,
	reusedBytes: 0
})
var EarlyRoom = class {
	#leftBytes = TUNING.earlyBytes
	take(sizeBytes) {
		const cost = Math.max(TUNING.earlyPieceBytes, sizeBytes)
		if (cost > this.#leftBytes) return false
		this.#leftBytes -= cost
		return true
	}
	giveBack(sizeBytes) {
		this.#leftBytes += Math.max(TUNING.earlyPieceBytes, sizeBytes)
	}
}
var BlobState = class {
	descriptor
	registry
	offset
	#sources
	#restartsLeft = 1
	#isDone = false
	#recordedAtMs = 0
	#state
	#early = /* @__PURE__ */ new Map()
	constructor(descriptor, registry, offset = 0, tars = []) {
		this.descriptor = descriptor
		this.registry = registry
		this.offset = offset
		this.#state = nothingOf(descriptor.digest)
		this.#sources = tars.flatMap(({handle, blobs}) => {
			const entry = blobs.get(descriptor.digest)
			return entry?.sizeBytes === descriptor.size ? [{handle, offset: entry.offset}] : []
		})
	}
	get source() {
		return this.#sources[0]
	}
	get doneBytes() {
		return lengthOf(this.#state.come)
	}
	get isDone() {
		return this.#isDone
	}
	get hashedTo() {
		return this.#state.hashedTo
	}
	get inPlace() {
		return this.#state.inPlace
	}
	get unrecordedBytes() {
		return this.#state.unrecordedBytes
	}
	get resumedBytes() {
		return this.#state.resumedBytes
	}
	get reusedBytes() {
		return this.#state.reusedBytes
	}
	missing(range = [0, this.descriptor.size]) {
		return missingRanges(this.#state.come, range)
	}
	resume(ranges) {
		this.#state.come = ranges
		this.#state.inPlace = ranges
		this.#state.resumedBytes = lengthOf(ranges)
		if (ranges.length === 0) return
		this.#sources.length = 0
		this.#restartsLeft += 1
	}
	accept(position, bytes, room) {
		const isNew = this.missing([position, position + bytes.length])
		return isNew.map(([from, to]) => {
			const piece = bytes.subarray(from - position, to - position)
			if (from > this.#state.hashedTo && room?.take(piece.length)) this.#early.set(from, piece)
			else this.hashInOrder(from, piece, room)
			this.#state.come = addRange(this.#state.come, [from, to])
			if (this.source) this.#state.reusedBytes += piece.length
			return [from, piece]
		})
	}
	hashInOrder(position, bytes, room) {
		const known = this.#state.hashedTo - position
		if (known < 0 || known >= bytes.length) return
		this.#hashNext(bytes.subarray(known))
		for (let next = this.#takeEarly(room); next; next = this.#takeEarly(room)) this.#hashNext(next)
	}
	#hashNext(bytes) {
		this.#state.hash.update(bytes)
		this.#state.hashedTo += bytes.length
		if (CONFIG_TYPES.includes(this.descriptor.mediaType)) this.#state.config.push(bytes)
	}
	#takeEarly(room) {
		const {hashedTo} = this.#state
		const bytes = this.#early.get(hashedTo)
		this.#early.delete(hashedTo)
		if (bytes) room?.giveBack(bytes.length)
		return bytes
	}
	toReadBack() {
		const {hashedTo, inPlace} = this.#state
		const [from, to] = inPlace.find(([, end2]) => end2 > hashedTo) ?? [NEVER, NEVER]
		if (from > hashedTo) return void 0
		let end = to
		for (const early of this.#early.keys()) if (early > hashedTo) end = Math.min(end, early)
		return [hashedTo, end]
	}
	markWritten(position, sizeBytes) {
		this.#state.inPlace = addRange(this.#state.inPlace, [position, position + sizeBytes])
		this.#state.unrecordedBytes += sizeBytes
	}
	isRecordDue(nowMs) {
		const {unrecordedBytes} = this.#state
		const isOld = nowMs - this.#recordedAtMs >= TUNING.batchMs / 2
		return unrecordedBytes >= TUNING.journalBytes || (unrecordedBytes > 0 && isOld)
	}
	markRecorded(nowMs) {
		this.#state.unrecordedBytes = 0
		this.#recordedAtMs = nowMs
	}
	verify() {
		const {hash, hashedTo} = this.#state
		const {digest, size} = this.descriptor
		const isRight = hashedTo === size && hash.digest("hex") === hexOf(digest)
		if (isRight) this.#checkConfig()
		return isRight
	}
	#checkConfig() {
		const {digest, mediaType} = this.descriptor
		if (!CONFIG_TYPES.includes(mediaType)) return
		const config = parseJson(Buffer.concat(this.#state.config))
		if (!isRecord(config)) fail("PROTOCOL", `${digest}: this config is not a JSON object`)
	}
	markDone() {
		this.#isDone = true
	}
	keep() {
		this.#state.come = [[0, this.descriptor.size]]
		this.#state.inPlace = this.#state.come
		this.#state.reusedBytes = this.descriptor.size
		this.#isDone = true
	}
	restart(isFromMirror, room) {
		for (const bytes of this.#early.values()) room?.giveBack(bytes.length)
		this.#early.clear()
		this.#state = nothingOf(this.descriptor.digest)
		if (this.#sources.shift()) return {liar: "source", isLast: false}
		if (!isFromMirror) this.#restartsLeft -= 1
		return {liar: "registry", isLast: this.#restartsLeft < 0}
	}
	dropSource() {
		this.#sources.shift()
	}
}
var sizeOf = blobs => sumOf(blobs, ({descriptor}) => descriptor.size)
var blobsOf = ({entries}, tars, isOwnFile = false) =>
	entries.flatMap(({blob, offset}) =>
		blob ? [new BlobState(blob.descriptor, blob.registry, isOwnFile ? 0 : offset, tars)] : []
	)
var isFast = ({connections, bytesPerMs}) => bytesPerMs / connections > TUNING.fastBytesPerMs
var noiseOf = measured => (isFast(measured) ? TUNING.fastNoise : TUNING.noise)
var Pace = class {
	most
	#few
	#wanted
	#maySplit = false
	#start
	#held
	#trial
	#wasSlower = false
	#sinceMs = 0
	#nextTrialMs = 0
	#pauseMs = TUNING.trialPauseMs
	constructor(most) {
		this.most = most
		this.#few = Math.min(most, TUNING.firstConnections)
		this.#wanted = this.#few
	}
	get wanted() {
		return this.#wanted
	}
	get maySplit() {
		return this.#maySplit
	}
	get bytesPerMsEach() {
		return this.#held ? this.#held.bytesPerMs / this.#held.connections : 0
	}
	observe(sample) {
		if (sample.open === 0) return
		const start = this.#start
		if (!start || start.flowing === 0) this.#sinceMs = sample.nowMs
		if (!start || start.flowing === 0 || this.#isSettling(sample)) {
			this.#start = sample
			return
		}
		const elapsedMs = sample.nowMs - start.nowMs
		if (elapsedMs < (this.#held ? TUNING.measureMs : TUNING.firstMeasureMs)) return
		this.#start = sample
		const bytesPerMs = (sample.cameBytes - start.cameBytes) / elapsedMs
		const busy = (sample.busyMs - start.busyMs) / elapsedMs
		this.#judge({connections: sample.open, bytesPerMs, busy}, sample)
	}
	#isSettling({open, flowing, waitMs, nowMs}) {
		const trial = this.#trial
		if (!trial || trial.chances < TUNING.trialChances) return false
		const isLongEnough = nowMs - trial.sinceMs > 6 * waitMs + TUNING.measureMs
		const isUnderWay = open > trial.against.connections && flowing >= 0.75 * open
		return !isUnderWay && !isLongEnough
	}
	#judge(measured, sample) {
		if (this.#trial) this.#judgeTrial(measured, sample.nowMs)
		else this.#held ??= measured
		const held = this.#held
		const isSlow = measured.bytesPerMs < 0.6 * held.bytesPerMs
		const isSlower = isSlow && this.#wasSlower
		this.#wasSlower = isSlow
		if (isSlower) this.#nextTrialMs = sample.nowMs
		if (isSlower || measured.bytesPerMs > held.bytesPerMs) this.#held = measured
		if (!this.#trial && sample.nowMs >= this.#nextTrialMs) this.#try(measured, sample)
	}
	#judgeTrial(measured, nowMs) {
		const trial = this.#trial
		const isFaster = measured.bytesPerMs > trial.against.bytesPerMs * (1 + noiseOf(trial.against))
		trial.chances -= 1
		if (!isFaster && trial.chances > 0) return
		this.#trial = void 0
		this.#held = measured
		if (isFaster) return
		this.#wanted = Math.max(trial.against.connections, this.#few)
		this.#maySplit = false
		this.#nextTrialMs = nowMs + this.#pauseMs
		this.#pauseMs *= 4
	}
	#try({busy}, {nowMs, open, leftBytes}) {
		if (this.#maySplit && this.#wanted >= this.most) return
		if (open >= this.most) return
		const against = {...this.#held, connections: open}
		if (busy * (1 + noiseOf(against)) > TUNING.busyLoop) return
		const leftMs = leftBytes / against.bytesPerMs
		if (leftMs < (isFast(against) ? TUNING.fastWorthMs : TUNING.worthTryingMs)) return
		const isEarly = nowMs - this.#sinceMs < TUNING.fastMeasureMs
		if (isFast(against) && isEarly) return
		const more = Math.max(this.#few, Math.ceil(open * TUNING.growth))
		this.#wanted = Math.min(this.most, isFast(against) ? 2 * open : more)
		this.#maySplit = true
		this.#trial = {against, sinceMs: nowMs, chances: TUNING.trialChances}
	}
}
var Segment = class {
	blob
	at
	to
	state = "waiting"
	askedAtMs = 0
	constructor(blob, [at, to]) {
		this.blob = blob
		this.at = at
		this.to = to
	}
	get remainingBytes() {
		return this.to - this.at
	}
	get isComplete() {
		return this.at >= this.to
	}
	get isFlowing() {
		return this.state === "flowing"
	}
	get place() {
		return this.blob.offset + this.at
	}
}
var longestFirst = (left, right) => right.remainingBytes - left.remainingBytes
var inOrder = (left, right) => left.place - right.place
var isLateBeside = (waitMs, otherMs) => waitMs > 3 * otherMs + TUNING.promptMs
var RangeManners = class {
	isWelcome = true
	#look = "not taken"
	#quickestMs = NEVER
	#hasGivenOne = false
	#wasLate = false
	answered(waitMs) {
		this.#quickestMs = Math.min(this.#quickestMs, waitMs)
	}
	tried(waitMs, firstWaitMs) {
		if (!isLateBeside(waitMs, firstWaitMs)) this.#hasGivenOne = true
		else if (this.#wasLate) this.isWelcome = false
		else this.#wasLate = true
	}
	lookedAgain(look) {
		this.#look = look
	}
	get waitMs() {
		return Number.isFinite(this.#quickestMs) ? this.#quickestMs : 0
	}
	wantsLook(firstWaitMs) {
		if (firstWaitMs === NEVER) return false
		return firstWaitMs > TUNING.promptMs && this.#look === "not taken"
	}
	mostUnanswered(firstWaitMs) {
		if (!this.isWelcome || firstWaitMs === NEVER) return 0
		if (firstWaitMs <= TUNING.promptMs) return NEVER
		if (this.#look === "not taken" || this.#look === "under way") return 0
		if (this.#look !== "impossible") {
			if (isLateBeside(firstWaitMs, this.#look.waitMs)) return 0
			if (firstWaitMs <= 3 * this.#look.waitMs) return NEVER
		}
		return this.#hasGivenOne ? NEVER : 1
	}
}
var Schedule = class {
	#pace
	#horizon
	#queued = []
	#active = /* @__PURE__ */ new Set()
	#parts = /* @__PURE__ */ new Map()
	#origins = /* @__PURE__ */ new Set()
	#manners = /* @__PURE__ */ new Map()
	#waits = /* @__PURE__ */ new Map()
	#units = /* @__PURE__ */ new Map()
	#limits = /* @__PURE__ */ new Map()
	#abandoned = []
	#nowMs = 0
	#addedBytes = 0
	#cameBytes = 0
	constructor({most, horizon}) {
		this.#pace = new Pace(most)
		this.#horizon = horizon
	}
	get isOver() {
		return this.#queued.length + this.#active.size === 0
	}
	get activeBlobs() {
		return new Set([...this.#active].map(({blob}) => blob))
	}
	get connections() {
		return this.#active.size
	}
	get cameBytes() {
		return this.#cameBytes
	}
	add(blobs) {
		for (const blob of blobs) {
			this.#units.delete(blob)
			this.#origins.add(blob.registry.origin)
			const missing = blob.missing()
			this.#addedBytes += lengthOf(missing)
			for (const range of missing.length > 0 ? missing : [[0, 0]]) this.#queued.push(this.#make(blob, range))
		}
		this.#queued.sort(this.#horizon ? inOrder : longestFirst)
	}
	#make(blob, range) {
		const segment = new Segment(blob, range)
		this.#parts.set(blob, this.#partsOf(blob).add(segment))
		return segment
	}
	#partsOf(blob) {
		return this.#parts.get(blob) ?? /* @__PURE__ */ new Set()
	}
	#queuedParts(blob) {
		return [...this.#partsOf(blob)].filter(segment => !this.#active.has(segment))
	}
	#dropQueued(segment) {
		this.#queued.splice(this.#queued.indexOf(segment), 1)
		this.#forget(segment)
	}
	#forget(segment) {
		const parts = this.#partsOf(segment.blob)
		parts.delete(segment)
		if (parts.size === 0) this.#parts.delete(segment.blob)
	}
	next() {
		if (this.#connectionsInUse() >= this.#pace.wanted) return void 0
		const segment = this.#horizon ? this.#nextInOrder() : (this.#takeQueued() ?? this.#cut())
		if (!segment) return void 0
		this.#active.add(segment)
		return segment
	}
	#nextInOrder() {
		const horizon = this.#horizon?.() ?? NEVER
		const longest = this.#longest()
		const cutPlace = longest ? longest.place + this.#kept(longest) : NEVER
		const queued = this.#firstQueued()
		if (Math.min(cutPlace, queued?.place ?? NEVER) >= horizon) return void 0
		return queued && queued.place < cutPlace ? this.#takeQueued() : this.#cut()
	}
	#takeQueued() {
		const queued = this.#firstQueued()
		if (!queued) return void 0
		const {blob} = queued
		const unit = this.#knownUnit(blob)
		const isShared = blob.registry.acceptsRanges && this.#mostUnanswered(blob) > 0
		if (isShared && queued.remainingBytes > 1.5 * unit) {
			const first = this.#make(blob, [queued.at, queued.at + unit])
			queued.at = first.to
			return first
		}
		this.#queued.splice(this.#queued.indexOf(queued), 1)
		if (!blob.registry.acceptsRanges) this.#absorbQueued(queued)
		return queued
	}
	#firstQueued() {
		const isAnyOpen = [...this.#origins].some(origin => this.#hasRoom(origin))
		if (!isAnyOpen) return void 0
		const isAllowed = ({blob}) => this.#hasRoom(blob.registry.origin) && this.#mayJoin(blob)
		const allowed = this.#queued.find(isAllowed)
		return allowed && this.#queuedParts(allowed.blob).sort(inOrder)[0]
	}
	#cut() {
		const longest = this.#longest()
		if (!longest) return void 0
		const {blob, at, to} = longest
		const unit = this.#unitOf(longest)
		const from = at + this.#kept(longest)
		const end = to - from > 1.5 * unit ? from + unit : to
		longest.to = from
		if (end < to) {
			this.#queued.unshift(this.#make(blob, [end, to]))
			this.#queued.sort(this.#horizon ? inOrder : longestFirst)
		}
		return this.#make(blob, [from, end])
	}
	#kept(segment) {
		const half = Math.ceil((segment.remainingBytes + this.#headStartOf(segment.blob)) / 2)
		return Math.min(this.#unitOf(segment), half)
	}
	#headStartOf({registry}) {
		return Math.ceil(this.#pace.bytesPerMsEach * this.#mannersOf(registry).waitMs)
	}
	#knownUnit(blob) {
		return this.#pace.maySplit ? (this.#units.get(blob) ?? NEVER) : NEVER
	}
	#unitOf({blob, remainingBytes}) {
		const known = this.#units.get(blob)
		if (known !== void 0) return known
		const share = Math.ceil(remainingBytes / this.#pace.most)
		const most = this.#horizon ? Math.ceil(TUNING.streamWindowBytes / this.#pace.most) : TUNING.unitBytes
		const unit = Math.max(this.#headStartOf(blob) + this.#worthBytes(), Math.min(share, most))
		this.#units.set(blob, unit)
		return unit
	}
	#longest() {
		if (!this.#pace.maySplit) return void 0
		const candidates = [...this.#active].filter(segment => this.#isWorthCutting(segment))
		const cuttable = candidates.filter(({blob}) => this.#maySplit(blob) && this.#hasRoom(blob.registry.origin))
		return cuttable.sort(this.#horizon ? inOrder : longestFirst)[0]
	}
	#isWorthCutting({isFlowing, remainingBytes, blob}) {
		return isFlowing && remainingBytes >= this.#headStartOf(blob) + 2 * this.#worthBytes()
	}
	#worthBytes() {
		return Math.ceil(Math.max(TUNING.splitBytes, this.#pace.bytesPerMsEach * TUNING.worthMs))
	}
	#mayJoin(blob) {
		const isMoving = other => other.blob === blob && !this.#isAhead(other)
		const isUnderWay = [...this.#active].some(isMoving)
		return !isUnderWay || blob.source !== void 0 || this.#maySplit(blob)
	}
	#maySplit(blob) {
		const {registry, source} = blob
		if (source || !registry.acceptsRanges) return false
		const isUnanswered = other => other.blob.registry === registry && other.at > 0 && !other.isFlowing
		return [...this.#active].filter(isUnanswered).length < this.#mostUnanswered(blob)
	}
	#mostUnanswered(blob) {
		return this.#mannersOf(blob.registry).mostUnanswered(this.#firstWaitMs(blob))
	}
	#firstWaitMs(blob) {
		return this.#waits.get(blob) ?? NEVER
	}
	#mannersOf(registry) {
		const known = this.#manners.get(registry) ?? new RangeManners()
		this.#manners.set(registry, known)
		return known
	}
	#hasRoom(origin) {
		const limit = this.#limits.get(origin)?.at(this.#nowMs) ?? NEVER
		return this.#connectionsTo(origin) < limit
	}
	#connectionsTo(origin) {
		const isThere = ({blob, state}) => blob.registry.origin === origin && state !== "left"
		return [...this.#active].filter(isThere).length
	}
	#connectionsInUse() {
		return [...this.#active].filter(({state}) => state !== "left").length
	}
	#isAhead({place}) {
		return this.#horizon !== void 0 && place >= this.#horizon()
	}
	asked(segment, nowMs) {
		segment.state = "asked"
		segment.askedAtMs = nowMs
	}
	answered(segment, answer) {
		if (segment.state === "left") return
		segment.state = "flowing"
		if (!answer) return
		const {waitMs, isRange, isMiss, isElsewhere} = answer
		const {blob} = segment
		const manners = this.#mannersOf(blob.registry)
		manners.answered(waitMs)
		const isFirst = !this.#waits.has(blob)
		const firstWaitMs = isElsewhere ? 0 : waitMs
		if (isFirst || !isRange) this.#waits.set(blob, isMiss ? NEVER : firstWaitMs)
		else if (this.#mostUnanswered(blob) === 1) manners.tried(waitMs, this.#firstWaitMs(blob))
	}
	advance(segment, sizeBytes, answeredTo) {
		segment.at += sizeBytes
		this.#cameBytes += sizeBytes
		if (!segment.isComplete || segment.at >= answeredTo) return
		const isBehind = other => other.at === segment.to && !other.isComplete
		const behind = this.#queuedParts(segment.blob).find(isBehind)
		if (behind) {
			this.#takeBehind(segment, behind, answeredTo)
			return
		}
		const parts = [...this.#partsOf(segment.blob)]
		const idle = parts.find(other => isBehind(other) && !other.isFlowing)
		if (!idle) return
		segment.to = idle.to
		idle.to = idle.at
		if (this.#mostUnanswered(idle.blob) !== 1) this.#abandoned.push(idle)
	}
	#takeBehind(segment, behind, answeredTo) {
		const unit = this.#knownUnit(segment.blob)
		segment.to = Math.min(behind.to, behind.at + unit, answeredTo)
		behind.at = segment.to
		if (behind.isComplete) this.#dropQueued(behind)
	}
	paused(segment) {
		segment.state = "waiting"
	}
	isLast(segment) {
		return this.#partsOf(segment.blob).size === 1
	}
	end(segment) {
		this.#active.delete(segment)
		this.#forget(segment)
	}
	observe(nowMs, busyMs) {
		this.#nowMs = nowMs
		const active = [...this.#active]
		const waits = active.map(({blob}) => this.#mannersOf(blob.registry).waitMs)
		this.#pace.observe({
			nowMs,
			cameBytes: this.#cameBytes,
			leftBytes: Math.max(0, this.#addedBytes - this.#cameBytes),
			open: active.length,
			flowing: active.filter(({isFlowing}) => isFlowing).length,
			waitMs: Math.max(0, ...waits),
			busyMs
		})
	}
	registryToLookAt() {
		if (this.#connectionsInUse() >= this.#pace.wanted) return void 0
		const isUnclear = segment => {
			const {blob, isFlowing} = segment
			const {registry, source} = blob
			const wantsLook = this.#mannersOf(registry).wantsLook(this.#firstWaitMs(blob))
			if (!isFlowing || source || !wantsLook) return false
			const isWorthIt = this.#pace.maySplit && this.#isWorthCutting(segment)
			return isWorthIt || this.#queuedParts(blob).length > 0
		}
		return [...this.#active].find(isUnclear)?.blob.registry
	}
	lookedAgain(registry, look) {
		this.#mannersOf(registry).lookedAgain(look)
	}
	takeAbandoned(nowMs) {
		for (const segment of this.#active) if (this.#isLate(segment, nowMs)) this.#abandonLate(segment)
		return this.#abandoned.splice(0)
	}
	#abandonLate(segment) {
		const {blob} = segment
		if (this.#mostUnanswered(blob) <= 1) this.#mannersOf(blob.registry).isWelcome = false
		this.#waits.set(blob, NEVER)
		if (!this.#wouldRepeat(segment) && this.giveBack(segment)) this.#abandoned.push(segment)
	}
	#isLate({blob, at, askedAtMs, state}, nowMs) {
		if (at === 0 || state !== "asked") return false
		const {waitMs} = this.#mannersOf(blob.registry)
		if (nowMs - askedAtMs < 5 * waitMs + TUNING.lateMs) return false
		return [...this.#active].some(other => other.blob === blob && other.isFlowing)
	}
	giveBack(segment) {
		const [missing] = segment.blob.missing([segment.at, segment.to])
		segment.at = missing ? missing[0] : segment.to
		if (segment.isComplete) return true
		const neighbour = this.#lastBefore(segment.blob, segment.at, segment)
		if (!neighbour) return false
		neighbour.to = Math.max(neighbour.to, segment.to)
		segment.to = segment.at
		return true
	}
	#lastBefore(blob, place, but) {
		const isBefore = other => other !== but && other.blob === blob && other.at <= place && !other.isComplete
		return [...this.#active].filter(isBefore).sort((left, right) => right.at - left.at)[0]
	}
	stopRanges(segment) {
		const {blob} = segment
		blob.registry.giveUpRanges()
		const isLeft = this.giveBack(segment)
		const heir = isLeft ? this.#lastBefore(blob, blob.descriptor.size) : segment
		if (heir) this.#absorbQueued(heir)
		return isLeft ? "left to another" : "has to fetch the whole"
	}
	takeWhole(segment) {
		const {blob} = segment
		const isOther = other => other !== segment && other.blob === blob
		if ([...this.#active].some(isOther)) return false
		segment.at = 0
		segment.to = blob.descriptor.size
		this.#absorbQueued(segment)
		return true
	}
	#absorbQueued(segment) {
		const isAbsorbed = other => other !== segment && other.at >= segment.at
		for (const queued of this.#queuedParts(segment.blob).filter(isAbsorbed)) {
			segment.to = Math.max(segment.to, queued.to)
			this.#dropQueued(queued)
		}
	}
	crowded(segment, nowMs) {
		const {origin} = segment.blob.registry
		const isOther = other => other !== segment && ["asked", "flowing"].includes(other.state)
		const others = [...this.#active].filter(other => isOther(other) && other.blob.registry.origin === origin)
		if (others.length === 0) return false
		const moving = others.filter(other => !this.#isAhead(other)).length
		const furthest = others.sort(inOrder).at(-1)
		if (moving === 0 && furthest) this.#leave(furthest)
		const limit = this.#limits.get(origin) ?? new ConnectionLimit()
		this.#limits.set(origin, limit)
		limit.lower(Math.max(1, moving), nowMs)
		return true
	}
	#leave(segment) {
		if (!segment.isComplete) this.#queueAgain(segment)
		segment.state = "left"
		this.#abandoned.push(segment)
	}
	yieldSegment(segment) {
		if (!this.#wouldRepeat(segment) && this.giveBack(segment)) return
		this.#queueAgain(segment)
	}
	#queueAgain(segment) {
		this.#queued.unshift(this.#make(segment.blob, [segment.at, segment.to]))
		if (this.#horizon) this.#queued.sort(inOrder)
		segment.to = segment.at
	}
	#wouldRepeat(segment) {
		const {blob, at} = segment
		const from = this.#lastBefore(blob, at, segment)?.to ?? at
		return from < at && lengthOf(blob.missing([from, at])) < at - from
	}
}
var ConnectionLimit = class {
	#most = NEVER
	#raiseAtMs = 0
	#pauseMs = TUNING.trialPauseMs
	lower(most, nowMs) {
		this.#most = Math.min(most, this.#most)
		this.#raiseAtMs = nowMs + this.#pauseMs
		this.#pauseMs *= 2
	}
	at(nowMs) {
		if (nowMs >= this.#raiseAtMs) {
			this.#most += 1
			this.#raiseAtMs = nowMs + this.#pauseMs
		}
		return this.#most
	}
}
var Change = class {
	#waiting = /* @__PURE__ */ new Set()
	announce() {
		for (const wake of this.#waiting) wake()
	}
	next(signal, atMostMs) {
		if (signal.aborted) return Promise.resolve()
		return new Promise(resolve2 => {
			const wake = () => {
				clearTimeout(timer)
				signal.removeEventListener("abort", wake)
				this.#waiting.delete(wake)
				resolve2()
			}
			const timer = atMostMs === void 0 ? void 0 : setTimeout(wake, atMostMs)
			signal.addEventListener("abort", wake)
			this.#waiting.add(wake)
		})
	}
	async until(isReady, signal) {
		while (!isReady()) {
			if (signal.aborted) stopped()
			await this.next(signal)
		}
	}
}
var CACHE_HEADERS = ["cache-status", "cf-cache-status", "x-cache", "x-cache-status", "x-proxy-cache"]
function isCacheMiss({headers}) {
	const words = CACHE_HEADERS.map(name => headers[name] ?? "").join()
	const isMiss = /(^|[^a-z])miss/i.test(words) && !/(^|[^a-z]|refresh)hit/i.test(words)
	return isMiss || /^\d+$/.test(String(headers["x-varnish"] ?? ""))
}
function judgeAnswer({status, headers}, [at, to], sizeBytes) {
	let position = 0
	let end = sizeBytes
	if (status === 206) {
		const contentRange = headers["content-range"] ?? "none"
		const [, first, last, total] = /^bytes[ =](\d+)-(\d+)\/(\d+|\*)$/i.exec(contentRange) ?? []
		position = Number(first)
		end = Number(last) + 1
		const isTotal = total === "*" || Number(total) === sizeBytes
		const least = Math.min(to, at + LIMITS.leastAnswerBytes)
		const isUseful = position <= at && at < end && end >= least && end <= sizeBytes
		if (!isTotal || !isUseful) {
			const got = outside(contentRange, 80)
			const reason = `asked for bytes ${at}-${to - 1} of ${sizeBytes}, got "${got}"`
			return {code: "PROTOCOL", reason}
		}
	}
	const length = Number(headers["content-length"] ?? end - position)
	const isEncoded = /^(x-)?gzip$/i.test(headers["content-encoding"] ?? "")
	if (length !== end - position && !isEncoded)
		return {code: "SIZE_MISMATCH", reason: `${length} bytes, not ${end - position}`}
	return {position, end}
}
var untilNow = ({waitedMs, openedAtMs, ...line}) => ({
	...line,
	waitMs: waitedMs + performance.now() - openedAtMs
})
function openSource({handle, offset}, {at, to}) {
	const stream = Readable.from(readPlace(handle, offset + at, offset + to))
	return {stream, doing: "reading a tar at hand", position: at, end: to}
}
async function openSegment(schedule, segment, signal) {
	const {blob, at, to} = segment
	const {descriptor, registry, source} = blob
	const {size} = descriptor
	if (source) return openSource(source, segment)
	const needed = [at, to]
	const isRanged = registry.acceptsRanges && to - at < size
	const range = isRanged ? needed : [0, size]
	const asking = registry.blob(descriptor, ...range, signal)
	const answer = await asking.catch(error => {
		if (!isRanged || !isRangeRefusal(error)) throw error
		schedule.stopRanges(segment)
	})
	if (!answer?.body) return void 0
	const {body, status} = answer
	const doing = `GET ${redactUrl(answer.url)}`
	const judged = judgeAnswer(answer, needed, size)
	if ("code" in judged) {
		body.destroy()
		if (!isRanged || status !== 206) fail(judged.code, `${doing}: ${judged.reason}`, {status})
		schedule.stopRanges(segment)
		return void 0
	}
	if (isRanged && status !== 206 && schedule.stopRanges(segment) === "left to another") {
		body.destroy()
		return void 0
	}
	const {position, end} = judged
	const {waitedMs, isElsewhere} = answer
	const line = {
		waitedMs,
		openedAtMs: performance.now(),
		isRange: status === 206,
		isMiss: isCacheMiss(answer),
		isElsewhere
	}
	return {stream: await decodeBody(body, end - position), doing, position, end, line}
}
var BatchWriter = class {
	#stream
	#write
	#enoughBytes
	#position = 0
	#batch = []
	#batchBytes = 0
	#underWay = 0
	#writing = Promise.resolve()
	#age
	constructor(stream, write, enoughBytes) {
		this.#stream = stream
		this.#write = write
		this.#enoughBytes = enoughBytes
	}
	add(position, chunk) {
		const follows = position === this.#position + this.#batchBytes
		if (!follows && this.#batchBytes > 0) this.#flush()
		if (!follows) this.#position = position
		this.#age ??= setTimeout(() => this.#flush(), TUNING.batchMs)
		this.#batch.push(chunk)
		this.#batchBytes += chunk.length
		if (this.#batchBytes >= this.#enoughBytes()) this.#flush()
	}
	async end() {
		if (this.#batchBytes > 0) this.#flush()
		await this.#writing
	}
	#flush() {
		clearTimeout(this.#age)
		this.#age = void 0
		const written = this.#write(this.#position, this.#batch).finally(() => {
			this.#underWay -= 1
			this.#stream.resume()
		})
		this.#position += this.#batchBytes
		this.#batch = []
		this.#batchBytes = 0
		this.#underWay += 1
		if (this.#underWay > 1) this.#stream.pause()
		this.#writing = Promise.all([this.#writing, written])
		this.#writing.catch(() => this.#stream.destroy())
	}
}
var {O_RDONLY, O_RDWR, O_WRONLY, O_CREAT, O_EXCL} = constants
var {O_NOFOLLOW = 0, O_NONBLOCK = 0} = constants
async function statAt(file) {
	try {
		return await fs.lstat(file, {bigint: true})
	} catch (error) {
		if (errorCodeOf(error) === "ENOENT") return void 0
		throw error
	}
}
var identityOf = ({dev, ino}) => `${isWindows ? "" : dev}:${ino}`
var isSameFile = (left, right) => left !== void 0 && identityOf(left) === identityOf(right)
async function openRegular(file, flags = O_RDONLY) {
	const before = await statAt(file)
	if (!before?.isFile()) return void 0
	const handle = await fs.open(file, flags | O_NOFOLLOW | O_NONBLOCK)
	const stats = await handle.stat({bigint: true})
	if (stats.isFile()) return {handle, stats}
	await handle.close()
	return void 0
}
var readAndClose = ({handle}) => handle.readFile().finally(() => handle.close())
var createFile = (file, mode = 438) => fs.open(file, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, mode)
function isOwn(stats, model) {
	const isOpenToOthers = (stats.mode & 18n & ~model.mode) !== 0n
	return stats.isFile() && stats.uid === model.uid && stats.nlink <= 1n && !isOpenToOthers
}
async function readOwn(file, model) {
	const opened = await openRegular(file).catch(ignore)
	if (!opened) return void 0
	if (isOwn(opened.stats, model)) return (await readAndClose(opened)).toString("utf8")
	await opened.handle.close()
	return void 0
}
var removeQuietly = file => fs.unlink(file).catch(ignore)
async function moveFile(from, to) {
	if ((await statAt(from))?.isDirectory()) fail("DISK", `${from} is in the way: it is a directory`)
	try {
		await fs.rename(from, to)
		return true
	} catch (error) {
		const code = errorCodeOf(error)
		if (code === "ENOENT") return false
		if (code !== "EPERM" && code !== "EACCES") throw error
		const words = `${from} cannot be moved aside: ${diskWords(error)} (is it another user's?)`
		return fail("DISK", words, {cause: error})
	}
}
async function replaceFile(aside, file) {
	await fs.rename(aside, file).catch(error => {
		const words = `${file} cannot be replaced: ${diskWords(error)}`
		return fail("DISK", words, {cause: error})
	})
}
async function putBack(aside, file) {
	try {
		await fs.link(aside, file)
	} catch (error) {
		if (errorCodeOf(error) !== "EEXIST") return fs.rename(aside, file)
	}
	await removeQuietly(aside)
}
async function takeFile(file, aside, isMeant) {
	if (!(await moveFile(file, aside))) return false
	const stats = await statAt(aside)
	if (stats && (await isMeant(stats))) return true
	await putBack(aside, file)
	return false
}
async function startOf(pid) {
	const text = (await readOptional(`/proc/${pid}/stat`)) ?? ""
	const [state, ...fields] = text.slice(text.lastIndexOf(")") + 2).split(" ")
	return state === "Z" || state === "X" ? void 0 : fields[18]
}
async function describeSelf() {
	const {pid} = process
	const id = load("node:crypto").randomBytes(8).toString("hex")
	const self = {id, pid, host: os.hostname(), space: "", started: ""}
	if (process.platform !== "linux") return {...self, space: `${process.platform} ${os.hostname()}`}
	const link = file => fs.readlink(file).catch(ignore)
	const [boot, namespace, started, seenPid] = await Promise.all([
		readOptional("/proc/sys/kernel/random/boot_id"),
		link("/proc/self/ns/pid"),
		startOf("self"),
		link("/proc/self")
	])
	const isOurProc = seenPid === String(pid)
	if (!boot || !namespace || !started || !isOurProc) return self
	return {...self, space: `${boot.trim()} ${namespace}`, started}
}
function parseOwner(text) {
	const parsed = parseJson(text)
	if (!isRecord(parsed)) return void 0
	const word = key => String(parsed[key] ?? "")
	const id = /^[0-9a-f]{16}$/.test(word("id")) ? word("id") : ""
	const owner = {id, pid: Number(parsed.pid), host: word("host")}
	return {...owner, space: word("space"), started: word("started")}
}
async function fateOf(owner, self) {
	if (owner.space === "" || owner.space !== self.space) return "unknown"
	try {
		process.kill(owner.pid, 0)
	} catch (error) {
		if (errorCodeOf(error) === "ESRCH") return "dead"
		if (errorCodeOf(error) !== "EPERM") return "unknown"
	}
	if (process.platform !== "linux") return "unknown"
	return (await startOf(owner.pid)) === owner.started ? "alive" : "dead"
}
async function readLock(file) {
	const stats = await statAt(file)
	if (!stats?.isFile()) return stats && {stats, owner: void 0}
	try {
		const opened = await openRegular(file)
		if (!opened) return void 0
		const reading = readAt(opened.handle, 0, LIMITS.lockBytes)
		const bytes = await reading.finally(() => opened.handle.close())
		return {stats: opened.stats, owner: parseOwner(bytes.toString("utf8"))}
	} catch (error) {
		return errorCodeOf(error) === "ENOENT" ? void 0 : {stats, owner: "unreadable"}
	}
}
var Lock = class _Lock {
	owner
	model
	#file
	#aside
	#handle
	#timer
	constructor(file, owner, handle, model) {
		this.#file = file
		this.#aside = `${file}.${owner.id}`
		this.owner = owner
		this.model = model
		this.#handle = handle
	}
	static async acquire(file, dest) {
		const owner = await describeSelf()
		const aside = `${file}.${owner.id}`
		const handle = await createFile(aside)
		try {
			await handle.write(JSON.stringify(owner), 0)
			const lock = new _Lock(file, owner, handle, await handle.stat({bigint: true}))
			await lock.#settle(dest)
			lock.#timer = setInterval(() => lock.#beat(), LIMITS.lockBeatMs).unref()
			return lock
		} catch (error) {
			await handle.close()
			throw error
		} finally {
			await removeQuietly(aside)
		}
	}
	async #settle(dest) {
		for (let attempt = 0; attempt < 8; attempt += 1) {
			if (await this.#isPlaced()) return
			let seen = await readLock(this.#file)
			if (seen && !seen.owner) {
				await delay(LIMITS.lockBirthMs)
				seen = await readLock(this.#file)
			}
			if (!seen) continue
			const words = await this.#whoHasIt(seen)
			if (words !== void 0) fail("DISK", `${dest} is being pulled by another imgpull${words}: wait, or name another`)
			await this.#takeOver(seen.stats)
		}
		fail("DISK", `${dest} is being pulled by another imgpull`)
	}
	async #isPlaced() {
		try {
			await fs.link(this.#aside, this.#file)
			return true
		} catch (error) {
			if (errorCodeOf(error) === "EEXIST") return false
		}
		try {
			const handle = await createFile(this.#file)
			await this.#handle.close()
			this.#handle = handle
		} catch (error) {
			if (errorCodeOf(error) === "EEXIST") return false
			throw error
		}
		try {
			await this.#handle.write(JSON.stringify(this.owner), 0)
			return true
		} catch (error) {
			await removeQuietly(this.#file)
			throw error
		}
	}
	async #whoHasIt({stats, owner}) {
		if (!owner) return void 0
		const isKnown = owner !== "unreadable"
		const fate = isKnown ? await fateOf(owner, this.owner) : "unknown"
		const who = isKnown ? printable(`process ${owner.pid} on ${owner.host}`, 80) : "another user's"
		if (fate === "alive") return ` (${who})`
		if (fate === "dead") return void 0
		const ageMs = Number(this.model.mtimeMs - stats.mtimeMs)
		const isLapsed = ageMs >= LIMITS.lockStaleMs
		if (isLapsed || ageMs < -LIMITS.lockBeatMs) return void 0
		const seconds = milliseconds => Math.max(1, Math.ceil(milliseconds / 1e3))
		const remedy = `if that one is gone, its lock lapses in ${seconds(LIMITS.lockStaleMs - ageMs)} s`
		return ` (${who}, seen ${seconds(ageMs)} s ago)
  ${remedy}`
	}
	async #takeOver(seen) {
		const aside = `${this.#aside}.old`
		const isSeen = stats => isSameFile(stats, seen) && stats.mtimeNs === seen.mtimeNs
		if (await takeFile(this.#file, aside, isSeen)) await removeQuietly(aside)
	}
	#beat() {
		this.#handle.write(JSON.stringify(this.owner), 0).catch(ignore)
	}
	async #isOwn(file) {
		const stats = await this.#handle.stat({bigint: true})
		if (!isSameFile(await statAt(file), stats)) return false
		const bytes = await readAt(this.#handle, 0, LIMITS.lockBytes)
		return parseOwner(bytes.toString("utf8"))?.id === this.owner.id
	}
	async assertOurs(dest) {
		if (await this.isOurs()) return
		fail("DISK", `cannot write ${dest}: another imgpull took it over; run it again`)
	}
	async isOurs() {
		for (let attempt = 0; attempt < 3; attempt += 1) {
			if (await this.#isOwn(this.#file)) return true
			if (await statAt(this.#file)) return false
			await delay(20)
		}
		return false
	}
	async release() {
		clearInterval(this.#timer)
		const aside = `${this.#aside}.old`
		const isOwn2 = () => this.#isOwn(aside)
		const isTaken = await takeFile(this.#file, aside, isOwn2).catch(ignore)
		if (!isTaken) await this.#handle.truncate().catch(ignore)
		await this.#handle.close().catch(ignore)
		if (isTaken) await removeQuietly(aside)
	}
}
function parseNotes(text) {
	const [planId = "", ...lines] = text.split("\n")
	const inPlace = /* @__PURE__ */ new Map()
	let owner
	let partial = ""
	for (const line of lines) {
		const [, digest = "", rangeText = ""] = /^(\S+) ([\d,-]*);$/.exec(line) ?? []
		const [, identity, signature] = /^by (\S+) (\{.*\})$/.exec(line) ?? []
		if (identity !== void 0) {
			partial = identity
			owner = parseOwner(signature ?? "")
		}
		let ranges = []
		for (const range of rangeText.split(",")) {
			const [from = 0, to = 0] = range.split("-").map(Number)
			if (from < to) ranges = addRange(ranges, [from, to])
		}
		inPlace.set(digest, ranges)
	}
	return {planId, owner, partial, isClosed: lines.includes("closed"), inPlace}
}
var Journal = class _Journal {
	#file
	#handle
	#inPlace
	constructor(file, handle, inPlace) {
		this.#file = file
		this.#handle = handle
		this.#inPlace = inPlace
	}
	static async read(file, model) {
		return parseNotes((await readOwn(file, model)) ?? "")
	}
	static async begin(file, owner, {planId, partial, inPlace}) {
		const aside = `${file}.${owner.id}`
		const handle = await createFile(aside)
		const journal = new _Journal(file, handle, inPlace)
		try {
			await handle.write(`${planId}
by ${partial || "-"} ${JSON.stringify(owner)}
`)
			for (const [digest, ranges] of inPlace) journal.#recordRanges(digest, ranges)
			await replaceFile(aside, file)
			return journal
		} catch (error) {
			await handle.close()
			await removeQuietly(aside)
			throw error
		}
	}
	rangesOf(digest) {
		return this.#inPlace.get(digest) ?? []
	}
	record(blob) {
		blob.markRecorded(performance.now())
		this.#recordRanges(blob.descriptor.digest, blob.inPlace)
	}
	#recordRanges(digest, ranges) {
		this.#append(`${digest} ${ranges.map(range => range.join("-")).join(",")};
`)
	}
	#append(text) {
		try {
			appendFileSync(this.#handle.fd, text)
		} catch {}
	}
	async close() {
		this.#append("closed\n")
		await this.#handle.close()
	}
	async remove() {
		const stats = await this.#handle.stat({bigint: true})
		await this.#handle.close()
		if (isSameFile(await statAt(this.#file), stats)) await removeQuietly(this.#file)
	}
}
var ASIDE_NAME = /^(.*\.partial)(\.journal|\.lock)?\.([0-9a-f]{16})(\.old|\.copy)?$/
async function fenceOff({folder, isOurs, deadId, lock}) {
	const names = await listOptional(folder)
	await lock.assertOurs(folder)
	for (const name of names) {
		const [, partial = "", kind, id, ending] = ASIDE_NAME.exec(name) ?? []
		if (!isOurs(partial) || id === lock.owner.id) continue
		const file = path.join(folder, name)
		const isLeft = id === deadId && kind === void 0 && ending === void 0
		if (isLeft) await fs.rename(file, path.join(folder, partial)).catch(ignore)
		else await removeQuietly(file)
	}
}
async function findDeadId(journalFile, {model, owner}) {
	const before = (await Journal.read(journalFile, model)).owner
	return before && (await fateOf(before, owner)) === "dead" ? before.id : void 0
}
function isPushback(error) {
	if (!(error instanceof ImgpullError)) return false
	const {code, status, cause} = error
	return code === "RATE_LIMITED" || status === 503 || (code === "NETWORK" && cause !== void 0)
}
var isRefusal = ({code, cause}) => code !== "NETWORK" || errorCodeOf(cause) === "ECONNREFUSED"
var Transfer = class {
	blobs
	totalBytes
	signal
	#session
	#sink
	#observe
	#journal
	#schedule
	#change = new Change()
	#stopping = new AbortController()
	#room
	#running = /* @__PURE__ */ new Set()
	#leaving = /* @__PURE__ */ new Map()
	#catchingUp = /* @__PURE__ */ new Map()
	#crowded = /* @__PURE__ */ new Set()
	#reset = /* @__PURE__ */ new Set()
	#silent = /* @__PURE__ */ new Set()
	#failures = []
	#fetchedBytes = 0
	#doneBytes
	#blobsDone = 0
	#keptBytes
	#isUnchanged = false
	constructor(options) {
		const {session, blobs, sink, observe, journal, keptBytes = 0} = options
		this.signal = anySignal(session.signal, this.#stopping.signal)
		this.#session = {...session, signal: this.signal}
		this.blobs = blobs
		this.totalBytes = sizeOf(blobs)
		this.#doneBytes = sumOf(blobs, ({doneBytes}) => doneBytes)
		this.#keptBytes = keptBytes
		this.#sink = sink
		this.#room = sink.readBack && new EarlyRoom()
		this.#observe = observe
		this.#journal = journal
		const {horizon} = sink
		const most = session.settings.concurrency
		this.#schedule = new Schedule({most, ...(horizon && {horizon})})
	}
	get doneBytes() {
		return this.#doneBytes
	}
	get blobsDone() {
		return this.#blobsDone
	}
	get fetchedBytes() {
		return this.#fetchedBytes
	}
	get reusedBytes() {
		return this.#keptBytes + sumOf(this.blobs, ({reusedBytes}) => reusedBytes)
	}
	get resumedBytes() {
		return sumOf(this.blobs, ({resumedBytes}) => resumedBytes)
	}
	get activeBlobs() {
		return this.#schedule.activeBlobs
	}
	get isUnchanged() {
		return this.#isUnchanged
	}
	keep(blob) {
		blob.keep()
		this.#doneBytes += blob.doneBytes
		this.#blobsDone += 1
		this.#observe(this)
	}
	markUnchanged() {
		this.#isUnchanged = true
	}
	stop = error => {
		this.#stopping.abort()
		throw error
	}
	#fail = reason => {
		this.#failures.push({status: "rejected", reason})
		this.#stopping.abort()
	}
	async run() {
		this.#observe(this)
		this.#schedule.add(this.blobs)
		while (!this.#schedule.isOver && !this.signal.aborted) {
			this.#lookRound()
			await this.#change.next(this.signal, TUNING.tickMs)
			await new Promise(setImmediate)
		}
		await Promise.all(this.#running)
		settled(this.#failures)
		if (this.signal.aborted) stopped()
		await this.#sink.end?.()
	}
	#lookRound() {
		const nowMs = performance.now()
		this.#schedule.observe(nowMs, performance.eventLoopUtilization().active)
		for (const segment of this.#schedule.takeAbandoned(nowMs)) this.#leaving.get(segment)?.abort()
		const registry = this.#schedule.registryToLookAt()
		if (registry) this.#lookAgain(registry)
		for (let next = this.#schedule.next(); next; next = this.#schedule.next()) this.#start(next)
	}
	#lookAgain(registry) {
		const small = this.#smallOf(registry)
		if (!small) this.#schedule.lookedAgain(registry, "impossible")
		if (!small?.isDone) return
		this.#schedule.lookedAgain(registry, "under way")
		const ask = () => this.#waitFor(small)
		const isFromLine = small.resumedBytes + small.reusedBytes === 0
		const looking = isFromLine ? ask() : ask().then(ask)
		looking.then(
			waitMs => {
				this.#schedule.lookedAgain(registry, {waitMs})
				this.#change.announce()
			},
			() => this.#schedule.lookedAgain(registry, "impossible")
		)
	}
	#smallOf(registry) {
		const isSmall = ({descriptor, registry: its}) =>
			its === registry && descriptor.size > 0 && descriptor.size <= TUNING.smallBytes
		return this.blobs.find(blob => isSmall(blob) && !blob.source)
	}
	async #waitFor({descriptor, registry}, signal = this.signal) {
		const {body, waitedMs} = await registry.blob(descriptor, 0, descriptor.size, signal)
		if (body) await finished(body.resume())
		return waitedMs
	}
	#start(segment) {
		const running = this.#serve(segment).catch(this.#fail)
		this.#running.add(running)
		running.then(() => {
			this.#running.delete(running)
			this.#change.announce()
		})
	}
	async #serve(segment) {
		await this.#fetch(segment)
		if (this.#schedule.isLast(segment)) await this.#finishBlob(segment.blob)
		this.#schedule.end(segment)
	}
	async #fetch(segment) {
		const leaving = new AbortController()
		this.#leaving.set(segment, leaving)
		const signal = anySignal(this.signal, leaving.signal)
		try {
			await this.#fetchPatiently(segment, signal)
		} catch (error) {
			const isLeft = segment.isComplete && leaving.signal.aborted && !this.signal.aborted
			if (!isLeft) throw error
		} finally {
			this.#leaving.delete(segment)
		}
	}
	#fetchPatiently(segment, signal) {
		let before = segment.at
		const gotOn = () => {
			const enough = Math.min(TUNING.batchBytes, Math.ceil(segment.blob.descriptor.size / 64))
			const isEnough = segment.at - before >= enough
			before = segment.at
			return isEnough
		}
		const attempt = async () => {
			while (!segment.isComplete) await this.#receiveOrYield(segment, signal)
		}
		return withRetries({...this.#session, signal}, attempt, gotOn)
	}
	async #receiveOrYield(segment, signal) {
		const {at} = segment
		this.#schedule.asked(segment, performance.now())
		try {
			await this.#receive(segment, signal)
		} catch (error) {
			if (segment.isComplete) return
			const isRefused = isPushback(error) && segment.at === at && !this.signal.aborted
			if (isRefused && (await this.#isExcused(segment, error, signal))) return
			if (segment.at === at && (await this.#isOnlyTheRange(segment, error))) return
			const {registry, descriptor, source} = segment.blob
			if (source || !registry.canAskElsewhere(descriptor.digest, error)) throw error
		} finally {
			this.#schedule.paused(segment)
		}
	}
	async #isExcused(segment, error, signal) {
		const {retryAfterMs = 0} = error
		if (retryAfterMs > LIMITS.retryAfterMs) return false
		if (!this.#schedule.crowded(segment, performance.now())) return false
		if (isRefusal(error)) this.#tellOfCrowd(segment.blob.registry)
		else this.#reset.add(segment.blob)
		this.#schedule.paused(segment)
		if (retryAfterMs > 0) await this.#session.clock.sleep(retryAfterMs, signal).catch(ignore)
		else this.#schedule.yieldSegment(segment)
		return true
	}
	async #isOnlyTheRange(segment, error) {
		const isSilence = error instanceof ImgpullError && error.code === "TIMEOUT"
		const {blob} = segment
		const small = this.#smallOf(blob.registry)
		if (!isSilence || segment.at === 0 || blob.source || !small) return false
		const isSecond = this.#silent.has(blob)
		this.#silent.add(blob)
		if (!isSecond) return false
		const signal = anySignal(this.signal, AbortSignal.timeout(LIMITS.diagnosisMs))
		const isThere = await this.#waitFor(small, signal).then(
			() => true,
			() => false
		)
		return isThere && this.#schedule.takeWhole(segment)
	}
	#tellOfCrowd({origin}) {
		if (this.#crowded.has(origin)) return
		this.#crowded.add(origin)
		this.#session.warn(`${origin} refuses more connections: going on with fewer`)
	}
	async #receive(segment, signal) {
		const {blob} = segment
		const opened = await openSegment(this.#schedule, segment, signal)
		if (!opened) return
		const {stream, doing, end, line} = opened
		let {position} = opened
		const write = (at, chunks) => this.#write(blob, at, chunks)
		const writer = new BatchWriter(stream, write, () => this.#enoughBytes())
		stream.on("data", chunk => {
			if (!segment.isFlowing) this.#schedule.answered(segment, line && untilNow(line))
			const start = position
			position += chunk.length
			while (!segment.isComplete && segment.at >= start && segment.at < position) {
				const wanted = chunk.subarray(segment.at - start).subarray(0, segment.remainingBytes)
				for (const piece of this.#accept(segment, wanted, end)) writer.add(...piece)
			}
			if (position > end || (segment.isComplete && position < end)) stream.destroy()
		})
		const cause = await finished(stream, {signal}).then(ignore, error => error)
		stream.destroy()
		await writer.end()
		if (position > end) fail("SIZE_MISMATCH", `${doing}: more than the ${end} bytes that belong there`)
		if (segment.isComplete) return
		if (this.signal.aborted) stopped()
		if (cause instanceof ImgpullError || (cause && blob.source)) throw cause
		if (position < end) {
			const reason = `the connection ended after ${position} of ${end} bytes`
			fail("NETWORK", `${doing}: ${reason}`, {cause})
		}
	}
	#accept(segment, bytes, answeredTo) {
		const {blob} = segment
		if (this.#reset.delete(blob)) this.#tellOfCrowd(blob.registry)
		const pieces = blob.accept(segment.at, bytes, this.#room)
		this.#schedule.advance(segment, bytes.length, answeredTo)
		const newBytes = sumOf(pieces, ([, piece]) => piece.length)
		this.#doneBytes += newBytes
		if (!blob.source) this.#fetchedBytes += newBytes
		return pieces
	}
	#enoughBytes() {
		return Math.min(TUNING.batchBytes, TUNING.gatherBytes / this.#schedule.connections)
	}
	async #write(blob, position, chunks) {
		this.#observe(this)
		const sizeBytes = sumOf(chunks, ({length}) => length)
		await this.#sink.write(blob, position, chunks)
		blob.markWritten(position, sizeBytes)
		if (blob.isRecordDue(performance.now())) this.#journal?.record(blob)
		this.#catchUp(blob)
	}
	#catchUp(blob) {
		if (this.#catchingUp.has(blob) || !blob.toReadBack()) return
		const catchingUp = this.#readBack(blob).catch(this.#fail)
		this.#catchingUp.set(blob, catchingUp)
		catchingUp.then(() => this.#catchingUp.delete(blob))
	}
	async #readBack(blob) {
		const {readBack} = this.#sink
		if (!readBack) return
		for (let range = blob.toReadBack(); range; range = blob.toReadBack()) {
			let [position] = range
			for await (const piece of readBack(blob, range)) {
				blob.hashInOrder(position, piece, this.#room)
				position += piece.length
			}
		}
	}
	async #finishBlob(blob) {
		if (await this.#isVerified(blob)) {
			blob.markDone()
			this.#blobsDone += 1
			this.#observe(this, blob)
			return
		}
		this.#judgeWrongBytes(blob)
		this.#schedule.add([blob])
	}
	async #isVerified(blob) {
		if (!this.#sink.readBack) return true
		await this.#catchingUp.get(blob)
		await this.#readBack(blob)
		if (!blob.verify()) return false
		await this.#sink.seal?.(blob)
		this.#journal?.record(blob)
		return true
	}
	#judgeWrongBytes(blob) {
		const {descriptor, registry} = blob
		const words = `${descriptor.digest}: the bytes have another digest`
		const lie = new ImgpullError("DIGEST_MISMATCH", words)
		const isFromMirror = !blob.source && registry.canAskElsewhere(descriptor.digest, lie)
		this.#doneBytes -= blob.doneBytes
		const {liar, isLast} = blob.restart(isFromMirror, this.#room)
		if (liar === "source" || isFromMirror) return
		if (isLast) {
			this.#journal?.record(blob)
			const remedy = "ask who runs it, or one of `mirrors`"
			fail("DIGEST_MISMATCH", `${words}, twice, from ${registry.origin}: ${remedy}`)
		}
		this.#session.warn(`${words}; fetching the blob once more`)
	}
}
var DEVICE_NAME = /^(con|prn|aux|nul|com\d|lpt\d)\s*($|[.:])/i
async function resolveLink(file) {
	const link = await fs.readlink(file).catch(ignore)
	if (link === void 0) return file
	const target = path.resolve(await fs.realpath(path.dirname(file)), link)
	return resolveLink(target)
}
async function resolveFile(file) {
	try {
		return await fs.realpath(file)
	} catch (error) {
		if (errorCodeOf(error) !== "ENOENT") throw error
		return resolveLink(file)
	}
}
var withoutPrefix = file => file.replace(/^\\\\\?\\UNC\\/i, "\\\\").replace(/^\\\\\?\\/, "")
async function parseDestination(destination) {
	if (typeof destination !== "string") return {kind: "stream", output: destination}
	return parseFileDestination(isWindows ? withoutPrefix(destination) : destination)
}
async function parseFileDestination(destination) {
	const doing = `cannot write ${destination}`
	if (isWindows && DEVICE_NAME.test(path.basename(destination)))
		fail("DISK", `${doing}: that name is a device of Windows (- is stdout)`)
	const stats = await fs.stat(destination).catch(ignore)
	if (/[\\/]$/.test(destination) || stats?.isDirectory()) return {kind: "layout", folder: destination}
	if (stats?.isFIFO() || stats?.isCharacterDevice()) return {kind: "device", file: destination}
	if (stats?.isFile() === false) fail("DISK", `${doing}: it is there, and not a file (- is stdout)`)
	const folder = path.dirname(destination)
	const checking = fs.access(`${folder}/.`, constants.W_OK)
	await onDisk(`${doing}: the directory ${folder}`, checking)
	if (!(await fs.stat(folder)).isDirectory()) fail("DISK", `${doing}: the directory ${folder}: ${DISK_WORDS.ENOTDIR}`)
	return {kind: "tar", file: await onDisk(doing, resolveFile(destination))}
}
async function pullInto(destination, job) {
	switch (destination.kind) {
		case "stream":
			return pullToStream(job, destination.output)
		case "device":
			return pullToDevice(job, destination.file)
		case "layout":
			return pullToLayout(job, destination.folder)
		case "tar": {
			const {file} = destination
			return pullToTar(job, file).catch(tellOfInodes(path.dirname(file)))
		}
	}
}
async function writeAll(handle, chunks, position) {
	const {bytesWritten} = await handle.writev(chunks, position)
	if (bytesWritten === sumOf(chunks, ({length}) => length)) return
	const rest = Buffer.concat(chunks).subarray(bytesWritten)
	await writeAll(handle, [rest], position + bytesWritten)
}
async function syncQuietly(handle) {
	await handle.sync().catch(error => {
		if (!["ERR_ACCESS_DENIED", "EINVAL", "ENOSYS", "ENOTSUP", "EPERM"].includes(errorCodeOf(error))) throw error
	})
}
async function inFolder(folder, run) {
	const first = await fs.mkdir(folder, {recursive: true})
	const made = []
	const top = path.resolve(first ?? path.join(folder, "nothing was made"))
	for (let at = path.resolve(folder); at.length >= top.length; at = path.dirname(at)) made.push(at)
	try {
		return await run()
	} catch (error) {
		await removeEmpty(made)
		throw error
	}
}
async function removeEmpty(folders) {
	for (const folder of folders) await fs.rmdir(folder).catch(ignore)
}
async function syncFolder(folder) {
	const handle = await fs.open(folder, "r").catch(ignore)
	if (handle) await syncQuietly(handle).finally(() => handle.close())
}
async function checkFreeSpace(dest, place, neededBytes) {
	const {blocks, bavail, bsize} = await fs.statfs(place).catch(() => ({blocks: 0, bavail: 0, bsize: 1}))
	const freeBytes = blocks === 0 ? NEVER : bavail * bsize
	if (neededBytes <= freeBytes) return
	const words = `${formatBytes(neededBytes)} are needed and ${place} has ${formatBytes(freeBytes)} free`
	fail("DISK", `cannot write ${dest}: the disk is full, ${words}`)
}
var tellOfInodes = folder => async error => {
	const counts = errorCodeOf(error) === "ENOSPC" ? await fs.statfs(folder).catch(ignore) : void 0
	const isWithoutInodes = counts && counts.files > 0 && counts.ffree < 16 && counts.bavail > 0
	throw isWithoutInodes ? Object.assign(error, {code: "NO_INODES"}) : error
}
var BackgroundSync = class {
	#unsyncedBytes = 0
	#syncing = Promise.resolve()
	async written(handle, sizeBytes) {
		this.#unsyncedBytes += sizeBytes
		if (this.#unsyncedBytes < TUNING.syncBytes) return
		this.#unsyncedBytes = 0
		const before = this.#syncing
		this.#syncing = before.then(() => syncQuietly(handle))
		this.#syncing.catch(ignore)
		await before
	}
	end() {
		return this.#syncing
	}
}
function fileSink(open, seal) {
	const sync = new BackgroundSync()
	return {
		write: async (blob, position, chunks) => {
			const handle = await open(blob)
			await writeAll(handle, chunks, blob.offset + position)
			const sizeBytes = sumOf(chunks, ({length}) => length)
			await sync.written(handle, sizeBytes)
		},
		readBack: async function* (blob, [from, to]) {
			yield* readPlace(await open(blob), blob.offset + from, blob.offset + to)
		},
		seal: async blob => seal?.(blob),
		end: () => sync.end()
	}
}
async function fillPlaces(filling) {
	const {blobs, journal, open, seal, ...rest} = filling
	for (const blob of blobs) await resumeBlob(blob, journal, open)
	const transfer = new Transfer({...rest, blobs, journal, sink: fileSink(open, seal)})
	try {
		await transfer.run()
		return transfer
	} finally {
		for (const blob of blobs) if (blob.unrecordedBytes > 0) journal.record(blob)
	}
}
async function resumeBlob(blob, journal, open) {
	const {digest, size} = blob.descriptor
	const ranges = journal.rangesOf(digest)
	if (ranges.length === 0) return
	const {size: fileBytes} = await (await open(blob)).stat()
	const placeEnd = fileBytes - blob.offset
	blob.resume(ranges.filter(([, to]) => to <= size && to <= placeEnd))
}
async function writeFrame(handle, plan) {
	for (const {lead, bytes, offset} of plan.entries)
		await writeAll(handle, bytes ? [lead, bytes] : [lead], offset - lead.length)
	await writeAll(handle, [plan.trailer], plan.sizeBytes - plan.trailer.length)
	await handle.truncate(plan.sizeBytes)
}
async function hasFrame(handle, plan) {
	const {size} = await handle.stat()
	if (size !== plan.sizeBytes) return false
	const isThere = async (bytes, at) => bytes.equals(await readAt(handle, at, bytes.length))
	for (const {lead, bytes, offset} of plan.entries) {
		const frame = bytes ? Buffer.concat([lead, bytes]) : lead
		if (!(await isThere(frame, offset - lead.length))) return false
	}
	return isThere(plan.trailer, plan.sizeBytes - plan.trailer.length)
}
var NO_SINK = {write: () => Promise.resolve()}
async function keepUnchanged(job, dest) {
	const {session, plan, observe} = job
	const opened = await openRegular(dest).catch(ignore)
	if (!opened) return void 0
	const {handle} = opened
	try {
		if (!(await hasFrame(handle, plan))) return void 0
		const transfer = new Transfer({session, blobs: blobsOf(plan, []), sink: NO_SINK, observe})
		for (const blob of transfer.blobs) {
			if (!(await isIntact({handle, offset: blob.offset}, blob.descriptor, session.signal))) return void 0
			transfer.keep(blob)
		}
		transfer.markUnchanged()
		return transfer
	} catch (error) {
		if (session.signal.aborted) stopped(error)
		throw error
	} finally {
		await handle.close()
	}
}
async function openTaken(file, model) {
	const opened = await openRegular(file, O_RDWR).catch(ignore)
	if (opened && isOwn(opened.stats, model)) return opened
	await opened?.handle.close()
	await fs.unlink(file)
	return void 0
}
async function replaceByCopy(file) {
	const copy = `${file}.copy`
	try {
		await fs.copyFile(file, copy, constants.COPYFILE_FICLONE | constants.COPYFILE_EXCL)
		await fs.rename(copy, file)
		return (await openRegular(file, O_RDWR))?.handle
	} catch {
		await removeQuietly(copy)
		await removeQuietly(file)
		return void 0
	}
}
async function renameOver(from, dest) {
	const waitsMs = isWindows ? [50, 100, 200, 400, 800] : []
	for (;;) {
		try {
			return await fs.rename(from, dest)
		} catch (error) {
			if (!isWindows || !["EPERM", "EACCES", "EBUSY"].includes(errorCodeOf(error))) throw error
			const waitMs = waitsMs.shift()
			const words = "another program has it open, or it is read-only"
			if (waitMs === void 0) fail("DISK", `cannot write ${dest}: ${words}`, {cause: error})
			await delay(waitMs)
		}
	}
}
var PartialTar = class _PartialTar {
	file
	#dest
	#plan
	#lock
	#aside
	#journalFile
	#isTaken = false
	#inPlace = /* @__PURE__ */ new Map()
	#handle
	#journal
	constructor({dest, plan, lock}) {
		this.file = `${dest}.partial`
		this.#dest = dest
		this.#plan = plan
		this.#lock = lock
		this.#aside = `${this.file}.${lock.owner.id}`
		this.#journalFile = `${this.file}.journal`
	}
	get handle() {
		return this.#handle
	}
	get journal() {
		return this.#journal
	}
	static async open(place) {
		const partial = new _PartialTar(place)
		try {
			await partial.#claim()
			await partial.#checkSpace()
			await partial.#begin()
			return partial
		} catch (error) {
			await partial.close()
			throw error
		}
	}
	async #claim() {
		const {model} = this.#lock
		await this.#lock.assertOurs(this.#dest)
		this.#isTaken = await moveFile(this.file, this.#aside)
		if (this.#isTaken) await this.#lock.assertOurs(this.#dest)
		const found = this.#isTaken ? await openTaken(this.#aside, model) : void 0
		this.#isTaken = found !== void 0
		if (!found) return
		const notes = await Journal.read(this.#journalFile, model)
		const isOfPlan = notes.planId === this.#plan.id
		if (isOfPlan && Number(found.stats.size) === this.#plan.sizeBytes) return this.#goOnWith(found, notes)
		await found.handle.close()
		await fs.rename(this.#aside, `${this.file}.old`)
		this.#isTaken = false
	}
	async #goOnWith({handle, stats}, notes) {
		const {owner} = notes
		const isAbandoned =
			!owner ||
			(notes.partial === identityOf(stats) && (notes.isClosed || (await fateOf(owner, this.#lock.owner)) === "dead"))
		if (!isAbandoned) await handle.close()
		this.#handle = isAbandoned ? handle : await replaceByCopy(this.#aside)
		this.#isTaken = this.#handle !== void 0
		if (this.#isTaken) this.#inPlace = notes.inPlace
	}
	async #checkSpace() {
		const {blocks = 0} = (await this.#handle?.stat()) ?? {}
		const neededBytes = this.#plan.sizeBytes - blocks * BLOCK
		await checkFreeSpace(this.#dest, path.dirname(this.#dest), neededBytes)
	}
	async #begin() {
		const {mode: destMode = 438} = (await fs.stat(this.#dest).catch(ignore)) ?? {}
		const mode = (destMode & 511) | 384
		this.#handle ??= await createFile(this.#aside, mode)
		const {mode: actualMode} = await this.#handle.stat()
		if ((actualMode & 511 & ~mode) !== 0) await fs.chmod(this.#aside, actualMode & mode)
		this.#journal = await Journal.begin(this.#journalFile, this.#lock.owner, {
			planId: this.#plan.id,
			partial: identityOf(await this.#handle.stat({bigint: true})),
			inPlace: this.#inPlace
		})
		await this.#lock.assertOurs(this.#dest)
		await replaceFile(this.#aside, this.file)
		await writeFrame(this.#handle, this.#plan)
	}
	async become() {
		await syncQuietly(this.handle)
		const ours = await this.handle.stat({bigint: true})
		const isWhole = found => isSameFile(found, ours) && Number(found.size) === this.#plan.sizeBytes
		const isTaken = await takeFile(this.file, this.#aside, isWhole)
		if (!isTaken || !(await this.#lock.isOurs())) {
			if (isTaken) await putBack(this.#aside, this.file)
			this.#failTaken()
		}
		const isOneStep = await this.#giveName().catch(async error => {
			await putBack(this.#aside, this.file).catch(ignore)
			throw error
		})
		await this.handle.close()
		await this.journal.remove()
		return isOneStep
	}
	#failTaken(cause) {
		const words = `${this.file} was replaced or cut, or another imgpull took it over`
		return fail("DISK", `cannot write ${this.#dest}: ${words}; run it again`, {cause})
	}
	async #giveName() {
		try {
			await renameOver(this.#aside, this.#dest)
			await syncFolder(path.dirname(this.#dest))
			return true
		} catch (error) {
			if (errorCodeOf(error) === "ENOENT") this.#failTaken(error)
			if (errorCodeOf(error) !== "EBUSY") throw error
		}
		await this.#writeInPlace()
		await fs.unlink(this.#aside)
		return false
	}
	async #writeInPlace() {
		const {size, blocks} = await fs.stat(this.#dest)
		await checkFreeSpace(this.#dest, this.#dest, this.#plan.sizeBytes - blocks * BLOCK)
		const dest = await fs.open(this.#dest, O_WRONLY | O_NONBLOCK)
		try {
			await writeAll(dest, [Buffer.alloc(Math.min(BLOCK, size))], 0)
			let at = BLOCK
			for await (const piece of readPlace(this.handle, at, this.#plan.sizeBytes)) {
				await writeAll(dest, [piece], at)
				at += piece.length
			}
			await dest.truncate(this.#plan.sizeBytes)
			await syncQuietly(dest)
			await writeAll(dest, [await readAt(this.handle, 0, BLOCK)], 0)
			await syncQuietly(dest)
		} finally {
			await dest.close()
		}
	}
	async close(keptBytes = sumOf(this.#inPlace.values(), lengthOf)) {
		const ours = await this.#handle?.stat({bigint: true})
		await this.#handle?.close()
		if (!this.#journal) {
			if (this.#isTaken) await putBack(this.#aside, this.file)
			else await removeQuietly(this.#aside)
			return this.#isTaken
		}
		const isThere = ours !== void 0 && isSameFile(await statAt(this.file), ours)
		const isWhole = Number(ours?.size) === this.#plan.sizeBytes
		if (isThere && isWhole && keptBytes > 0) {
			await this.#journal.close()
			return true
		}
		if (isThere) await removeQuietly(this.file)
		await removeQuietly(this.#aside)
		await this.#journal.remove()
		return false
	}
}
async function sourcesBeside(dest, {model}) {
	const old = `${dest}.partial.old`
	const stats = await statAt(old)
	return openAtHand(stats && isOwn(stats, model) ? [old, dest] : [dest])
}
async function openAtHand(files) {
	const tars = await Promise.all(files.map(file => openTarFile(file).catch(ignore)))
	return tars.filter(tar => tar !== void 0)
}
async function closeTars(tars) {
	for (const {handle} of tars) await handle.close()
}
async function fillTar(job, dest, lock) {
	const {session, plan, tars, observe} = job
	const partial = await PartialTar.open({dest, plan, lock})
	const sources = [...tars, ...(await sourcesBeside(dest, lock))]
	const blobs = blobsOf(plan, sources)
	try {
		const {journal, handle} = partial
		const open = async () => handle
		const transfer = await fillPlaces({session, blobs, observe, journal, open})
		await closeTars(sources)
		if (!(await partial.become()))
			session.warn(`${dest} is mounted by itself: it was written in place, which was not one step`)
		return transfer
	} catch (error) {
		const keptBytes = sumOf(blobs, ({inPlace}) => lengthOf(inPlace))
		const words = `${partial.file} keeps ${formatBytes(keptBytes)}: the same command goes on from there`
		if (await partial.close(keptBytes)) session.warn(words)
		throw error
	} finally {
		await closeTars(sources)
	}
}
async function pullToTar(job, dest) {
	const partial = `${dest}.partial`
	const journalFile = `${partial}.journal`
	const lock = await Lock.acquire(`${partial}.lock`, dest)
	try {
		const deadId = await findDeadId(journalFile, lock)
		const isOurs = name => name === path.basename(partial)
		await fenceOff({folder: path.dirname(dest), isOurs, deadId, lock})
		const unchanged = await keepUnchanged(job, dest)
		const transfer = unchanged ?? (await fillTar(job, dest, lock))
		const leftovers = unchanged ? [partial, journalFile] : []
		for (const file of [...leftovers, `${partial}.old`]) await removeQuietly(file)
		return transfer
	} finally {
		await lock.release()
	}
}
var BlobFiles = class {
	#nameOf
	#lock
	#files = /* @__PURE__ */ new Map()
	constructor(nameOf, lock) {
		this.#nameOf = nameOf
		this.#lock = lock
	}
	#asideOf(blob) {
		return `${this.#nameOf(blob)}.partial.${this.#lock.owner.id}`
	}
	open = blob => {
		const file = this.#files.get(blob) ?? this.#open(blob)
		this.#files.set(blob, file)
		return file
	}
	async #open(blob) {
		const aside = this.#asideOf(blob)
		const isTaken = await moveFile(`${this.#nameOf(blob)}.partial`, aside)
		const found = isTaken ? await openTaken(aside, this.#lock.model) : void 0
		return found?.handle ?? createFile(aside)
	}
	seal = async blob => {
		const name = this.#nameOf(blob)
		const aside = this.#asideOf(blob)
		const handle = await this.open(blob)
		await handle.truncate(blob.descriptor.size)
		await syncQuietly(handle)
		const ours = await handle.stat({bigint: true})
		this.#files.delete(blob)
		await handle.close()
		if (!isSameFile(await statAt(aside), ours)) fail("DISK", `${aside} was replaced; run it again`)
		await replaceFile(aside, name)
	}
	async has(blob, signal) {
		const opened = await openRegular(this.#nameOf(blob)).catch(ignore)
		if (!opened) return false
		const {handle, stats} = opened
		try {
			const isWhole = Number(stats.size) === blob.descriptor.size
			return isWhole && (await isIntact({handle, offset: 0}, blob.descriptor, signal))
		} finally {
			await handle.close()
		}
	}
	async close() {
		for (const [blob, file] of this.#files) {
			const handle = await file.catch(ignore)
			await handle?.close()
			const aside = this.#asideOf(blob)
			if (blob.doneBytes === 0) await removeQuietly(aside)
			else await fs.rename(aside, `${this.#nameOf(blob)}.partial`).catch(ignore)
		}
	}
}
async function pullToFolder(job) {
	const {blobs, folder, nameOf} = job
	const base = path.join(folder, ".imgpull.partial")
	const isBlob = name => /^[0-9a-f]{64,128}\.partial$/.test(name)
	const isDocument = name => FOLDER_PARTIALS.includes(name)
	const isOurs = name => isBlob(name) || isDocument(name)
	const blobFolders = blobs.map(({descriptor}) => path.join(folder, path.dirname(nameOf(descriptor.digest))))
	const folders = [.../* @__PURE__ */ new Set([folder, ...blobFolders])]
	const lock = await Lock.acquire(`${base}.lock`, folder)
	let made = []
	try {
		made = (await job.makeFolders?.()) ?? []
		const deadId = await findDeadId(`${base}.journal`, lock)
		for (const place of folders) await fenceOff({folder: place, isOurs, deadId, lock})
		const transfer = await fillFolder(job, lock)
		const isWritten = (await job.seal?.(lock)) ?? false
		if (transfer.blobs.length === 0 && !isWritten) transfer.markUnchanged()
		await removeQuietly(`${base}.journal`)
		for (const place of folders)
			for (const name of await listOptional(place)) if (isOurs(name)) await removeQuietly(path.join(place, name))
		return transfer
	} catch (error) {
		const left = (await Promise.all(folders.map(listOptional))).flat()
		if (!left.some(isOurs) && (await lock.isOurs())) {
			await removeQuietly(`${base}.journal`)
			await removeEmpty(made)
		}
		throw error
	} finally {
		await lock.release()
	}
}
var FOLDER_PARTIALS = [".imgpull.partial", "index.json.partial", "oci-layout.partial"]
async function fillFolder(job, lock) {
	const {session, blobs, folder, nameOf, observe} = job
	const pathOf = ({descriptor}) => path.join(folder, nameOf(descriptor.digest))
	const files = new BlobFiles(pathOf, lock)
	const missing = []
	for (const blob of blobs) if (!(await files.has(blob, session.signal))) missing.push(blob)
	await checkFreeSpace(folder, folder, sizeOf(missing))
	const journalFile = path.join(folder, ".imgpull.partial.journal")
	const {inPlace} = await Journal.read(journalFile, lock.model)
	const notes = {planId: "folder", partial: "", inPlace}
	const journal = await Journal.begin(journalFile, lock.owner, notes)
	try {
		const {open, seal} = files
		const keptBytes = sizeOf(blobs) - sizeOf(missing)
		const filling = {session, blobs: missing, keptBytes, observe, journal, open, seal}
		return await fillPlaces(filling)
	} finally {
		await files.close()
		await journal.close()
	}
}
function mergeIndex(before, ours) {
	const nameOf = ({annotations, digest}) => annotations?.[NAME_KEYS[1]] ?? digest
	const names = new Set(ours.manifests.map(nameOf))
	const listed = Array.isArray(before.manifests) ? before.manifests : []
	const isOther = entry => !names.has(nameOf(entry))
	const merged = {...before, ...ours, manifests: [...listed.filter(isOther), ...ours.manifests]}
	const there = {...before, manifests: listed.filter(entry => !isOther(entry))}
	const wanted = {...merged, manifests: ours.manifests}
	return encodeJson(there).equals(encodeJson(wanted)) ? before : merged
}
async function readLayoutFile(file) {
	const opened = await openRegular(file)
	if (!opened) {
		if (await statAt(file)) fail("DISK", `${file} is in the way: it is not a regular file`)
		return void 0
	}
	return readAndClose(opened)
}
async function readLayoutIndex(folder) {
	const index = parseJson((await readLayoutFile(path.join(folder, "index.json"))) ?? "{}")
	if (isRecord(index)) return index
	return fail("DISK", `${folder} holds an index.json that is not a JSON object`)
}
async function makeLayoutFolders(folder, names) {
	const made = []
	const root = await fs.realpath(folder)
	const needed = /* @__PURE__ */ new Set()
	for (const name of names) for (let at = parentOf(name); at !== ""; at = parentOf(at)) needed.add(at)
	for (const name of [...needed].sort()) {
		const place = path.join(folder, name)
		try {
			await fs.mkdir(place)
			made.unshift(place)
		} catch (error) {
			if (errorCodeOf(error) !== "EEXIST") throw error
		}
		const inside = path.relative(root, await fs.realpath(place))
		if (inside.startsWith("..") || path.isAbsolute(inside))
			fail("DISK", `${place} is a link that leads out of ${folder}`)
	}
	return made
}
async function writeLayoutFile(file, bytes, lock) {
	const before = await openRegular(file).catch(ignore)
	const there = before && (await readAndClose(before))
	if (there?.equals(bytes)) return false
	const aside = `${file}.partial.${lock.owner.id}`
	const handle = await createFile(aside)
	try {
		await writeAll(handle, [bytes], 0)
		await syncQuietly(handle)
		await lock.assertOurs(file)
		await replaceFile(aside, file)
		return true
	} catch (error) {
		await removeQuietly(aside)
		throw error
	} finally {
		await handle.close()
	}
}
async function sealLayout(folder, documents, lock) {
	const before = await readLayoutIndex(folder)
	const ours = parseJson(documents.get("index.json") ?? "")
	let isWritten = false
	for (const [name, bytes] of documents) {
		if (name === "index.json" || name === "manifest.json") continue
		if (await writeLayoutFile(path.join(folder, name), bytes, lock)) isWritten = true
	}
	const merged = mergeIndex(before, ours)
	if (merged !== before) {
		await writeLayoutFile(path.join(folder, "index.json"), encodeJson(merged), lock)
		isWritten = true
	}
	if (isWritten) await syncFolder(folder)
	return isWritten
}
async function pullToLayout(job, folder) {
	const {session, plan, tars, observe} = job
	const documents = /* @__PURE__ */ new Map()
	for (const {name, bytes} of plan.entries) if (bytes) documents.set(name, bytes)
	const names = plan.entries.map(({name}) => name)
	const makeFolders = () => makeLayoutFolders(folder, names)
	const seal = lock => sealLayout(folder, documents, lock)
	const blobs = blobsOf(plan, tars, true)
	return inFolder(folder, async () => {
		await readLayoutIndex(folder)
		const job2 = {session, blobs, folder, nameOf: blobPath, observe, makeFolders, seal}
		return pullToFolder(job2).catch(tellOfInodes(folder))
	})
}
var ReadAhead = class {
	#early = /* @__PURE__ */ new Map()
	#change = new Change()
	#cursor = 0
	get horizon() {
		return this.#cursor + TUNING.streamWindowBytes
	}
	async put(place, bytes, signal) {
		const isNear = () => place < this.horizon
		await this.#change.until(isNear, signal)
		this.#early.set(place, bytes)
		this.#change.announce()
	}
	async take(place, signal) {
		this.moveTo(place)
		await this.#change.until(() => this.#early.has(place), signal)
		const bytes = this.#early.get(place)
		this.#early.delete(place)
		return bytes
	}
	moveTo(place) {
		this.#cursor = place
		this.#change.announce()
	}
}
async function dropLyingSources(blobs) {
	for (const blob of blobs) while (blob.source && !(await isIntact(blob.source, blob.descriptor))) blob.dropSource()
}
async function* tarInOrder(plan, {blobs, signal}, readAhead) {
	const byOffset = new Map(blobs.map(blob => [blob.offset, blob]))
	for (const {lead, bytes, offset, sizeBytes} of plan.entries) {
		yield lead
		if (bytes) yield bytes
		const blob = bytes ? void 0 : byOffset.get(offset)
		if (!blob) continue
		for (let place = offset; place < offset + sizeBytes; ) {
			const batch = await readAhead.take(place, signal)
			blob.hashInOrder(place - offset, batch)
			yield batch
			place += batch.length
			readAhead.moveTo(place)
		}
		if (!blob.verify()) fail("DIGEST_MISMATCH", `${blob.descriptor.digest}: the bytes have another digest`)
	}
	yield plan.trailer
}
async function pullToStream(job, output) {
	const {session, plan, tars, observe} = job
	const readAhead = new ReadAhead()
	const sink = {
		horizon: () => readAhead.horizon,
		write: ({offset}, position, chunks) => readAhead.put(offset + position, Buffer.concat(chunks), transfer.signal)
	}
	const blobs = blobsOf(plan, tars)
	const transfer = new Transfer({session, blobs, sink, observe})
	await dropLyingSources(blobs)
	const {signal} = transfer
	const pieces = tarInOrder(plan, transfer, readAhead)
	const source = Readable.from(pieces, {objectMode: true, highWaterMark: 1})
	const sending = pipeline(source, output, {end: false, signal})
	const failed = error => transfer.stop(signal.aborted ? connectionError(error, "the stream") : error)
	settled(await Promise.allSettled([transfer.run().catch(failed), sending.catch(failed)]))
	return transfer
}
async function openOutputPipe(file, {signal, warn}) {
	for (let waitedMs = 0; ; waitedMs += TUNING.readerPollMs) {
		if (waitedMs === TUNING.readerNewsMs) warn(`${file}: waiting for somebody to read it`)
		try {
			const descriptor = openSync(file, O_WRONLY | O_NONBLOCK)
			return new net.Socket({fd: descriptor, readable: false, writable: true})
		} catch (error) {
			if (errorCodeOf(error) !== "ENXIO") throw error
		}
		await delay(TUNING.readerPollMs, void 0, {signal})
	}
}
function openDevice(file) {
	const descriptor = openSync(file, O_WRONLY | O_NONBLOCK)
	if (!load("node:tty").isatty(descriptor)) return createWriteStream("", {fd: descriptor})
	closeSync(descriptor)
	return fail("BAD_OPTION", `the tar is not written to a terminal (${file})`)
}
async function pullToDevice(job, file) {
	const {signal} = job.session
	const isPipe = (await fs.stat(file)).isFIFO()
	const opening = isPipe ? openOutputPipe(file, job.session) : Promise.resolve(openDevice(file))
	const output = await opening.catch(error => {
		if (signal.aborted) stopped(error)
		throw error
	})
	try {
		const transfer = await pullToStream(job, output)
		await finished(output.end())
		return transfer
	} finally {
		output.destroy()
	}
}
var HASHES_OF_CURVE = /* @__PURE__ */ new Map([
	["prime256v1", ["sha256"]],
	["secp384r1", ["sha384", "sha256"]],
	["secp521r1", ["sha512", "sha256"]]
])
var NOT_PUBLIC_KEYS = [
	[/PRIVATE KEY/, "a private key, which does not belong here: give the public one (cosign.pub)"],
	[/CERTIFICATE/, "a certificate, and chains are not checked here: give its key (openssl x509 -pubkey -noout)"],
	[/PGP/, "a PGP key, which cosign does not sign with"]
]
function parsePublicKey(pem, name) {
	const refuse = reason => fail("BAD_OPTION", `the key ${printable(name)} is ${reason}`)
	const labels = Array.from(pem.matchAll(/-----BEGIN ([A-Z0-9 ]+)-----/g), ([, label = ""]) => label)
	const other = NOT_PUBLIC_KEYS.find(([pattern]) => labels.some(label => pattern.test(label)))
	if (other) return refuse(other[1])
	if (labels.length > 1) return refuse("more than one key: give each by itself")
	if (!/^(RSA )?PUBLIC KEY$/.test(labels[0] ?? "")) return refuse("no PEM public key (-----BEGIN PUBLIC KEY-----)")
	const publicKey = decodePublicKey(pem)
	if (!publicKey) return refuse("damaged: its PEM does not hold a public key")
	return {publicKey, hashes: hashesOf(publicKey, refuse)}
}
function decodePublicKey(pem) {
	try {
		return load("node:crypto").createPublicKey(pem)
	} catch {
		return void 0
	}
}
function hashesOf({asymmetricKeyType: type, asymmetricKeyDetails: details = {}}, refuse) {
	if (type === "ed25519") return [null]
	if (type === "rsa" && (details.modulusLength ?? 0) < 2048)
		return refuse("an RSA key of less than 2048 bits, which anyone may have broken")
	if (type === "rsa") return ["sha256"]
	const hashes = type === "ec" ? HASHES_OF_CURVE.get(details.namedCurve ?? "") : void 0
	if (hashes) return hashes
	const kind = printable(details.namedCurve ?? String(type), 40)
	return refuse(`a key of the kind ${kind}: cosign's are ECDSA P-256, P-384, P-521, RSA, Ed25519`)
}
var isSignedBy = (keys, message, signature) =>
	keys.some(({publicKey, hashes}) =>
		hashes.some(hash => load("node:crypto").verify(hash, message, publicKey, signature))
	)
var SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
var BUNDLE = "application/vnd.dev.sigstore.bundle"
var BUNDLE_VERSIONS = [`${BUNDLE}.v0.3+json`, `${BUNDLE}+json;version=0.3`]
var IN_TOTO = "application/vnd.in-toto+json"
var isSignature = ({mediaType}) => mediaType === SIMPLE_SIGNING || mediaType.startsWith(BUNDLE)
function checkSignatureCount({length}, where) {
	const {signatures} = LIMITS
	if (length > signatures) fail("TOO_LARGE", `${where}: more than ${signatures} signatures`)
}
function readSignature({mediaType, annotations = {}}, bytes, keys) {
	const isPayload = mediaType === SIMPLE_SIGNING
	return isPayload ? readPayload(annotations, bytes, keys) : readBundle(bytes, keys)
}
function readPayload(annotations, payload, keys) {
	const signature = fromBase64(annotations["dev.cosignproject.cosign/signature"])
	const isKeyless = "dev.sigstore.cosign/certificate" in annotations
	if (!isSignedBy(keys, payload, signature)) return isKeyless ? "keyless" : "other key"
	const critical = recordIn(parseJson(payload), "critical")
	if (critical.type !== "cosign container image signature") return "unreadable"
	const subject = recordIn(critical, "image")["docker-manifest-digest"]
	return {subjects: isDigest(subject) ? [subject] : []}
}
function readBundle(bytes, keys) {
	const bundle = recordIn(parseShallowJson(bytes, LIMITS.bundleJsonValues))
	const {payloadType, payload, signatures} = recordIn(bundle, "dsseEnvelope")
	const isEnvelope = payloadType === IN_TOTO && Array.isArray(signatures) && signatures.length === 1
	if (!BUNDLE_VERSIONS.includes(String(bundle.mediaType)) || !isEnvelope) return "unreadable"
	const statement = fromBase64(payload)
	const message = encodePreAuthentication(IN_TOTO, statement)
	const signature = fromBase64(recordIn(signatures[0]).sig)
	const {certificate, x509CertificateChain} = recordIn(bundle, "verificationMaterial")
	const isKeyless = (certificate ?? x509CertificateChain) !== void 0
	if (!isSignedBy(keys, message, signature)) return isKeyless ? "keyless" : "other key"
	return readStatement(statement)
}
function encodePreAuthentication(payloadType, payload) {
	const head = `DSSEv1 ${Buffer.byteLength(payloadType)} ${payloadType} ${payload.length} `
	return Buffer.concat([Buffer.from(head, "utf8"), payload])
}
function readStatement(bytes) {
	const {_type: type, subject: subjects} = recordIn(parseJson(bytes))
	const isStatement = typeof type === "string" && type.startsWith("https://in-toto.io/Statement/")
	if (!isStatement || !Array.isArray(subjects)) return "unreadable"
	const digests = subjects.flatMap(subject =>
		Object.entries(recordIn(subject, "digest")).map(([algorithm, hex]) => `${algorithm}:${hex}`)
	)
	return {subjects: digests.filter(isDigest)}
}
function judge(testimony, digests) {
	if (typeof testimony === "string") return testimony
	const isNamed = testimony.subjects.some(subject => digests.includes(subject))
	return isNamed ? "good" : "other subject"
}
function recordIn(value, ...keys) {
	let record = isRecord(value) ? value : {}
	for (const key of keys) {
		const inner = Object.hasOwn(record, key) ? record[key] : void 0
		record = isRecord(inner) ? inner : {}
	}
	return record
}
var fromBase64 = text => Buffer.from(typeof text === "string" ? text : "", "base64")
var COSIGN_TAGS = [
	{suffix: ".sig", kind: "dev.cosignproject.cosign/sigs"},
	{suffix: ".att", kind: "dev.cosignproject.cosign/atts"},
	{suffix: ".sbom"}
]
var referrersTag = digest => `${algorithmOf(digest)}-${hexOf(digest).slice(0, 64)}`
var ReferrerSearch = class {
	#session
	#registry
	#where
	#subjects
	#found = /* @__PURE__ */ new Map()
	constructor(session, registry, where, subjects) {
		this.#session = session
		this.#registry = registry
		this.#where = where
		this.#subjects = subjects
	}
	async run() {
		const {concurrency} = this.#session.settings
		let level = this.#subjects
		for (let depth = 0; depth < LIMITS.referrerDepth && level.length > 0; depth += 1) {
			const lists = await mapConcurrently(level, concurrency, each => this.#placesOf(each))
			const places = lists.flat()
			const referrers = await mapConcurrently(places, concurrency, each => this.#fetch(each))
			const fresh = referrers.filter(each => each !== void 0 && this.#add(each))
			level = fresh.map(each => each.top.digest)
		}
		return [...this.#found.values()].sort(byDigest)
	}
	#add(referrer) {
		const {digest} = referrer.top
		if (this.#found.has(digest) || this.#subjects.includes(digest)) return false
		this.#found.set(digest, referrer)
		this.#checkCount(this.#found.size)
		return true
	}
	#checkCount(count) {
		const {referrers} = LIMITS
		if (count > referrers) fail("TOO_LARGE", `${this.#where}: more than ${referrers} referrers`)
	}
	async #placesOf(subject) {
		const lists = (await this.#registry.referrers(subject)) ?? (await this.#taggedList(subject))
		const entries = lists.flatMap(bytes => listIn(parseJson(bytes), "manifests"))
		const where = `${this.#where}: its list of referrers`
		const digests = new Set(entries.map(entry => parseDescriptor(entry, where).digest))
		this.#checkCount(digests.size)
		const listed = Array.from(digests, digest => ({subject, digest}))
		const isTaggable = algorithmOf(subject) === "sha256"
		const tagged = (isTaggable ? COSIGN_TAGS : []).map(({suffix, ...kind}) => {
			const tag = `${referrersTag(subject)}${suffix}`
			return {subject, tag, ...kind}
		})
		return [...tagged, ...listed]
	}
	async #taggedList(subject) {
		const list = await this.#registry.proof(referrersTag(subject))
		return list ? [list.bytes] : []
	}
	async #fetch({subject, digest, tag, kind}) {
		const isListed = digest !== void 0
		const top = isListed ? await orMissing(this.#registry.manifest(digest)) : await this.#registry.proof(tag)
		const fault = top ? "refers to something else" : "is not there"
		if (isListed && (!top || subjectOf(top) !== subject)) {
			this.#session.warn(`${this.#where}: ${digest} is listed as a referrer, and ${fault}`)
			return void 0
		}
		const collected = top && (await this.#collect(top))
		if (!top || !collected) return void 0
		const {manifests, contents} = collected
		const artifactType = artifactTypeOf(top)
		const registry = this.#registry
		return {registry, top, manifests, contents, subject, ...dropEmpty({artifactType, kind})}
	}
	async #collect(top) {
		const readChild = childrenOf(this.#registry, this.#where)
		try {
			return await collectAll(readChild, 1, this.#where, top)
		} catch (error) {
			const {code, message} = error
			if (!["PROTOCOL", "UNSUPPORTED", "NOT_FOUND"].includes(code)) throw error
			this.#session.warn(`left out the referrer ${top.digest}: ${message}`)
			return void 0
		}
	}
}
var byDigest = (left, right) => (left.top.digest < right.top.digest ? -1 : 1)
async function orMissing(asked) {
	try {
		return await asked
	} catch (error) {
		if (error instanceof ImgpullError && error.code === "NOT_FOUND") return void 0
		throw error
	}
}
function listIn(value, key) {
	const list = recordIn(value)[key]
	return Array.isArray(list) ? list : []
}
var subjectOf = ({bytes}) => recordIn(parseJson(bytes), "subject").digest
function artifactTypeOf({bytes}) {
	const {artifactType, config} = recordIn(parseJson(bytes))
	if (typeof artifactType === "string" && artifactType !== "") return artifactType
	const {mediaType} = recordIn(config)
	return typeof mediaType === "string" && !CONFIG_TYPES.includes(mediaType) ? mediaType : ""
}
async function addProof(session, resolved, signers) {
	const {reference, registry, asked, top, manifests} = resolved
	const where = formatReference(reference)
	const subjects = [...new Set([asked, ...manifests].map(({digest}) => digest))]
	const referrers = await new ReferrerSearch(session, registry, where, subjects).run()
	const digests = [.../* @__PURE__ */ new Set([asked.digest, top.digest])]
	if (signers.length > 0) await requireSignature(session, {registry, where, digests}, referrers, signers)
	const hasIndex = asked !== top && isReferredTo(asked, referrers)
	const isIndexMarked = hasIndex && (hasSignature(asked, referrers) || !hasSignature(top, referrers))
	const marked = isIndexMarked ? asked : top
	const kind = cosignKind(marked, referrers)
	const companions = referrers.map(referrer => {
		const {kind: _kind, ...plain} = referrer
		return plain.subject === marked.digest ? referrer : plain
	})
	const image = {...resolved, ...dropEmpty({kind: isIndexMarked ? void 0 : kind})}
	if (!hasIndex) return {...image, companions}
	const above = await pathTo(top.digest, asked, childrenOf(registry, where), where)
	const indexes = (above ?? []).map(index => {
		const mark = dropEmpty({kind: isIndexMarked && index === asked ? kind : void 0})
		return {
			registry,
			top: index,
			manifests: [index],
			contents: [],
			subject: top.digest,
			isIndex: true,
			...mark
		}
	})
	return {...image, companions: [...indexes, ...companions]}
}
function planExtras(images) {
	const named = new Set(images.map(({top}) => top.digest))
	const all = images.flatMap(({companions: companions2 = []}) => companions2)
	const unique = new Map(all.map(companion => [companion.top.digest, companion]))
	const companions = [...unique.values()]
		.filter(({top}) => !named.has(top.digest))
		.sort((left, right) => Number(isReferrer(left)) - Number(isReferrer(right)) || byDigest(left, right))
	return {
		indexEntries: companions.map(companionEntry),
		documents: companions.flatMap(({manifests}) => manifests),
		blobs: companions.flatMap(({registry, contents}) =>
			contents
				.flatMap(({manifest}) => [manifest.config, ...manifest.layers])
				.map(descriptor => ({descriptor, registry}))
		)
	}
}
var isReferrer = ({isIndex: isIndex2 = false}) => !isIndex2
var SUBJECT_KEY = "io.containerd.manifest.subject"
var UNMATCHED = {architecture: "unknown", os: "unknown"}
function companionEntry({top, subject, kind, artifactType, isIndex: isIndex2}) {
	return {
		mediaType: top.mediaType,
		digest: top.digest,
		size: top.bytes.length,
		annotations: {[SUBJECT_KEY]: subject, ...dropEmpty({kind})},
		...dropEmpty({artifactType, platform: isIndex2 && UNMATCHED})
	}
}
var isReferredTo = ({digest}, referrers) => referrers.some(({subject}) => subject === digest)
var hasSignature = ({digest}, referrers) =>
	referrers.some(
		({subject, contents}) => subject === digest && contents.some(({manifest}) => manifest.layers.some(isSignature))
	)
function cosignKind(signed, referrers) {
	const own = referrers.filter(({subject}) => subject === signed.digest)
	const hasTag = own.some(({kind}) => kind === COSIGN_TAGS[0]?.kind)
	const isIndexEntry = hasTag && INDEX_TYPES.includes(signed.mediaType)
	if (own.length === 0) return void 0
	return `dev.cosignproject.cosign/${isIndexEntry ? "imageIndex" : "image"}`
}
async function requireSignature(session, {registry, where, digests}, referrers, signers) {
	const layers = referrers
		.filter(({subject}) => digests.includes(subject))
		.flatMap(({contents}) => contents.flatMap(({manifest}) => manifest.layers))
		.filter(isSignature)
	checkSignatureCount(layers, where)
	const read = layer => orMissing(registry.signature(layer))
	const {concurrency} = session.settings
	const verdicts = await mapConcurrently(layers, concurrency, async layer => {
		const bytes = layer.size > LIMITS.configBytes ? void 0 : await read(layer)
		return bytes ? judge(readSignature(layer, bytes, signers), digests) : "unreadable"
	})
	const pinned = `${where.replace(/@.*/, "")}@${digests[0]}`
	if (!verdicts.includes("good")) refuseUnsigned(pinned, verdicts, signers, registry.denial)
}
async function findSignature(session, unproven, signers) {
	if (signers.length === 0) return
	const {registry, where, digests} = unproven
	const referrers = await new ReferrerSearch(session, registry, where, digests).run()
	await requireSignature(session, unproven, referrers, signers)
}
var isEd25519 = ({publicKey}) => publicKey.asymmetricKeyType === "ed25519"
var VERDICT_WORDS = [
	["other key", "made by another key, or of something that was changed since"],
	["other subject", "by the key given, but of something else"],
	["keyless", "keyless, which needs Sigstore's trust root and is not checked here"],
	["unreadable", "in no form that is known here"]
]
function refuseUnsigned(where, verdicts, signers, denial) {
	const found = VERDICT_WORDS.flatMap(([verdict, words]) => {
		const count = verdicts.filter(each => each === verdict).length
		return count === 0 ? [] : [`${counted(count, "signature")} ${words}`]
	})
	const isPrehashed = verdicts.includes("other key") && signers.some(isEd25519)
	if (isPrehashed) found.push("what cosign signs with an Ed25519 key is prehashed, and not checked here")
	if (found.length === 0) found.push("no signature at all")
	if (denial !== void 0) found.push(`but there may be one that is denied: ${denial}`)
	return fail(
		"SIGNATURE",
		`${where} is not signed by any key given (\`signedBy\`)
  found: ${found.join("; ")}`
	)
}
var OPTION_KINDS = {
	url: "a string",
	scheme: "a string",
	osType: "a string",
	archType: "a string",
	variant: "a string",
	platforms: '"all" or a list of strings',
	name: "a string",
	renames: "an object of strings",
	reuse: "a list of strings",
	since: "a string",
	dryRun: "true or false",
	referrers: "true or false",
	signedBy: "a list of strings",
	username: "a string",
	password: "a string",
	token: "a string",
	tlsCert: "a string",
	tlsKey: "a string",
	caCert: "a string",
	insecure: "true or false",
	namespace: "a string",
	mirrors: "an object of lists of strings",
	concurrency: "a number",
	retries: "a number",
	timeoutMs: "a number",
	environment: "an object of strings",
	signal: "an AbortSignal",
	onProgress: "a function",
	onWarning: "a function"
}
var isStringOrNothing = value => value === void 0 || typeof value === "string"
var IS_OF_KIND = {
	"a string": value => typeof value === "string",
	"a number": value => typeof value === "number",
	"true or false": value => typeof value === "boolean",
	"a list of strings": isStringList,
	'"all" or a list of strings': value => value === "all" || isStringList(value),
	"an object of strings": value => isRecord(value) && Object.values(value).every(isStringOrNothing),
	"an object of lists of strings": value => isRecord(value) && Object.values(value).every(isStringList),
	"an AbortSignal": value => value instanceof AbortSignal,
	"a function": value => typeof value === "function"
}
function hasNul(value) {
	if (Array.isArray(value)) return value.some(hasNul)
	return typeof value === "string" && value.includes("\0")
}
function checkKinds(options, kinds) {
	if (!isRecord(options)) fail("BAD_OPTION", "the options are not an object")
	for (const [name, value] of Object.entries(options)) {
		if (!Object.hasOwn(kinds, name)) {
			const nearest = nearestName(name, Object.keys(kinds))
			const suggestion = nearest === void 0 ? "" : `: did you mean \`${nearest}\`?`
			fail("BAD_OPTION", `unknown option \`${printable(name, 60)}\`${suggestion}`)
		}
		const kind = kinds[name]
		if (value !== void 0 && !IS_OF_KIND[kind](value)) fail("BAD_OPTION", `\`${name}\` has to be ${kind}`)
		const isPath = name !== "url"
		if (isPath && hasNul(value)) fail("BAD_OPTION", `\`${name}\` has a NUL character`)
	}
}
function checkOption(isRight, reason) {
	if (!isRight) fail("BAD_OPTION", reason)
}
function checkOptions(options) {
	checkKinds(options, OPTION_KINDS)
	checkConnection(options)
	checkPlatforms(options)
	const {name, renames = {}} = options
	const hasRenames = Object.keys(renames).length > 0
	checkOption(name === void 0 || !hasRenames, "`name` and `renames` exclude each other")
	checkOption(!name?.includes("@"), "`name` is NAME or NAME:TAG: a digest cannot be given")
}
function checkConnection(options) {
	const {scheme, tlsCert, tlsKey, username, password, token, namespace} = options
	const isScheme = scheme === void 0 || scheme === "https" || scheme === "http"
	checkOption(isScheme, `\`scheme\` is https or http, not "${printable(String(scheme))}"`)
	const isPair = (tlsCert === void 0) === (tlsKey === void 0)
	checkOption(isPair, "`tlsCert` and `tlsKey` go together: a certificate and its key")
	checkOption(username === void 0 || password !== void 0, "`username` needs `password`")
	checkOption(password === void 0 || username !== void 0, "`password` needs `username`")
	const isOneKind = token === void 0 || username === void 0
	checkOption(isOneKind, "`token` and `username` exclude each other")
	const isHeader = token === void 0 || isHeaderWord(token)
	checkOption(isHeader, "`token` has characters that no header can carry")
	const isNamespace = namespace === void 0 || isHost(namespace)
	checkOption(isNamespace, `\`namespace\` is a host, not "${printable(namespace ?? "")}"`)
}
function checkPlatforms({platforms, osType, archType, variant}) {
	const isAlone = platforms === void 0 || (osType ?? archType ?? variant) === void 0
	checkOption(isAlone, "`platforms` excludes `osType`, `archType` and `variant`")
	if (platforms === void 0 || platforms === "all") return
	checkOption(platforms.length > 0, "`platforms` is an empty list")
	for (const platform of platforms) {
		const isPlatform = /^[^/]+\/[^/]+(\/[^/]+)?$/.test(platform)
		const quoted = `"${printable(platform)}"`
		checkOption(isPlatform, `\`platforms\`: ${quoted} is not OS/ARCH or OS/ARCH/VARIANT`)
	}
}
function integerOption(options, name, otherwise, [minimum, maximum]) {
	const value = options[name] ?? otherwise
	const isRight = Number.isSafeInteger(value) && value >= minimum && value <= maximum
	const unit = name === "timeoutMs" ? " (milliseconds)" : ""
	const bounds = `a whole number from ${minimum} to ${maximum}${unit}`
	if (!isRight) fail("BAD_OPTION", `\`${name}\` is ${bounds}, not ${value}`)
	return value
}
function choiceOf({platforms = []}) {
	if (platforms === "all") return "all"
	return platforms.length > 1 ? platforms.map(splitPlatform) : "one"
}
function wantedOf({platforms, osType, archType, variant}) {
	if (platforms === void 0) return dropEmpty({os: osType, architecture: archType, variant})
	if (platforms === "all" || platforms.length > 1) return {}
	return splitPlatform(platforms[0] ?? "")
}
function splitPlatform(text) {
	const [system, architecture, variant] = text.split("/")
	return dropEmpty({os: system, architecture, variant})
}
function settingsOf(options, environment, certsDirectory = "/etc/docker/certs.d") {
	checkOptions(options)
	const {scheme = "https", insecure = false, tlsCert, tlsKey, caCert} = options
	const {username, password, token, namespace} = options
	return {
		scheme,
		insecure,
		environment: environment ?? options.environment ?? process.env,
		certsDirectory,
		timeoutMs: integerOption(options, "timeoutMs", 3e4, [1, 864e5]),
		concurrency: integerOption(options, "concurrency", 16, [1, 64]),
		retries: integerOption(options, "retries", 5, [0, 100]),
		wanted: wantedOf(options),
		mirrors: parseMirrors(options.mirrors ?? {}, scheme),
		...dropEmpty({tlsCert, tlsKey, caCert, username, password, token, namespace})
	}
}
var Callbacks = class {
	#stopping
	#failure
	constructor(stopping) {
		this.#stopping = stopping
	}
	guard(callback) {
		if (!callback) return ignore
		return argument => {
			if (this.#failure) return
			try {
				const result = callback(argument)
				if (result instanceof Promise) result.catch(this.#fail)
			} catch (error) {
				this.#fail(error)
			}
		}
	}
	throwFailure() {
		if (this.#failure) throw this.#failure.reason
	}
	#fail = reason => {
		this.#failure ??= {reason}
		this.#stopping.abort()
	}
}
async function stoppable(callersSignal, run) {
	const stopping = new AbortController()
	const {signal} = stopping
	setMaxListeners(0, signal)
	const callbacks = new Callbacks(stopping)
	const stop = () => stopping.abort()
	callersSignal?.addEventListener("abort", stop)
	try {
		if (callersSignal?.aborted) stopped()
		const result = await run(signal, callbacks)
		callbacks.throwFailure()
		return result
	} catch (error) {
		callbacks.throwFailure()
		if (!callersSignal?.aborted) throw error
		return stopped(callersSignal.reason)
	} finally {
		callersSignal?.removeEventListener("abort", stop)
	}
}
async function withSession(options, run, replaced = {}) {
	const settings = settingsOf(options, replaced.environment, replaced.certsDirectory)
	const secrets = new Secrets()
	secrets.add(settings.password, settings.token)
	return stoppable(options.signal, async (signal, callbacks) => {
		const sendWarning = callbacks.guard(options.onWarning)
		const warn = message => sendWarning(secrets.strike(message))
		const transport = new Transport(settings, secrets)
		const session = {
			settings,
			transport,
			clock: systemClock,
			signal,
			warn,
			secrets,
			challenges: /* @__PURE__ */ new Map(),
			helpers: /* @__PURE__ */ new Map(),
			registries: /* @__PURE__ */ new Map(),
			budget: new Budget(),
			mirrorFaults: new MirrorFaults(),
			...replaced
		}
		try {
			return await run(session, callbacks.guard(options.onProgress))
		} catch (error) {
			secrets.strikeError(error)
			throw error
		} finally {
			transport.close()
		}
	})
}
var NO_PROGRESS = Object.freeze({
	phase: "resolve",
	doneBytes: 0,
	totalBytes: 0,
	fetchedBytes: 0,
	blobsDone: 0,
	blobsTotal: 0,
	moving: []
})
function progressReporter(onProgress) {
	const progressOf = ({descriptor, doneBytes}) => ({
		digest: descriptor.digest,
		sizeBytes: descriptor.size,
		doneBytes
	})
	let highestBytes = 0
	onProgress(NO_PROGRESS)
	const report = (transfer, phase, finished2) => {
		const {blobs, totalBytes, doneBytes, fetchedBytes, blobsDone, activeBlobs} = transfer
		highestBytes = Math.max(highestBytes, Math.min(totalBytes, doneBytes))
		const moving = [...activeBlobs].sort((left, right) => left.offset - right.offset)
		onProgress({
			phase,
			doneBytes: phase === "finish" ? totalBytes : highestBytes,
			totalBytes,
			fetchedBytes,
			blobsDone,
			blobsTotal: blobs.length,
			moving: moving.map(progressOf),
			...(finished2 && {finished: progressOf(finished2)})
		})
	}
	return {
		observe: (transfer, finished2) => report(transfer, "fetch", finished2),
		finish: transfer => report(transfer, "finish")
	}
}
function decodeText(bytes) {
	const mark = `${bytes[0]},${bytes[1]}`
	if (mark === "255,254") return new TextDecoder("utf-16le").decode(bytes)
	if (mark === "254,255")
		return new TextDecoder("utf-16le").decode(Buffer.from(bytes.subarray(0, bytes.length & ~1)).swap16())
	return new TextDecoder().decode(bytes)
}
function parseImageList(content) {
	const text = typeof content === "string" ? content : decodeText(content)
	const json = /^\s*[[{]/.test(text) ? parseJson(text) : void 0
	const unique = values => [...new Set(values)]
	if (json !== void 0) return {references: unique(imagesInJson(json)), format: "json", unread: 0}
	const isDocument = /^(---|\s*[[{])|^\s*(- +)*("[^"]*"|'[^']*'|[\w./-]+)[ \t]*:[ \t]+\S/m.test(text)
	if (isDocument) {
		const scan = new YamlScan()
		for (const line of text.split(/\r?\n/)) scan.read(line)
		scan.end()
		return {references: unique(scan.images), format: "yaml", unread: scan.unread}
	}
	const lines = text.split(/\r?\n/).map(line => line.replace(/(^|\s)#.*$/, "").trim())
	return {references: unique(lines.filter(line => line !== "")), format: "lines", unread: 0}
}
var isImageId = value => /^sha256:[0-9a-f]{64}$/.test(value)
function imagesInJson(document) {
	const images = []
	const values = [document]
	while (values.length > 0) {
		const value = values.pop()
		if (typeof value !== "object" || value === null) continue
		const {image} = value
		if (typeof image === "string" && image !== "" && !isImageId(image)) images.push(image)
		values.push(...Object.values(value).reverse())
	}
	return images
}
var YamlScan = class {
	images = []
	unread = 0
	#blockColumn
	#openQuote
	#flow
	read(line) {
		if (this.#continues(line)) return
		const {isImage: isImage2, value, parentColumn} = parseYamlLine(line)
		const isFlow = /^[[{]/.test(value)
		if (isFlow) this.#readFlow(value)
		const isPlain = !isFlow && !this.#beginsText(value, parentColumn)
		if (isImage2 && isPlain) this.#take(value)
		else if (isImage2) this.unread += 1
	}
	#continues(line) {
		if (this.#openQuote) {
			if (endsQuote(line, this.#openQuote)) this.#openQuote = void 0
			return true
		}
		if (this.#flow && !line.startsWith("---")) {
			this.#readFlow(line)
			return true
		}
		this.end()
		const column = line.search(/\S/)
		const isText = this.#blockColumn !== void 0 && column > this.#blockColumn
		if (column < 0 || isText) return true
		this.#blockColumn = void 0
		return false
	}
	#beginsText(value, parentColumn) {
		if (/^(?:[&!]\S+\s+)*[|>][-+\d]*(?:\s+#.*)?$/.test(value)) {
			this.#blockColumn = parentColumn
			return true
		}
		const quote2 = value[0]
		if ((quote2 !== '"' && quote2 !== "'") || endsQuote(value.slice(1), quote2)) return false
		this.#openQuote = quote2
		return true
	}
	end() {
		if (this.#flow) this.#takeFlow(this.#flow.text)
		this.#flow = void 0
	}
	#readFlow(line) {
		this.#flow ??= new FlowText()
		this.#flow.add(line)
		if (this.#flow.isClosed) this.end()
	}
	#takeFlow(text) {
		const entry = /[{,[]\s*(["']?)image\1\s*:\s*("[^"]*"|'[^']*'|[^\s,{}[\]"'][^,}\]]*)/
		const quoted = /(?<=[[{,:]\s{0,9})(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')/
		for (const [, , value] of text.matchAll(new RegExp(`${entry.source}|${quoted.source}`, "gs")))
			if (value !== void 0) this.#take(value)
	}
	#take(value) {
		const [, inDouble, inSingle] = /^(?:"([^"]*)"|'([^']*)')/.exec(value) ?? []
		const plain = value.replace(/(^|\s)#.*$/, "").replace(/\s*(,|\s[}\]]).*$/, "")
		if (/^[&*!{[]/.test(value)) this.unread += 1
		else this.#add(inDouble ?? inSingle ?? plain.trim())
	}
	#add(word) {
		const isEmpty = ["", "~", "null"].includes(word)
		if (!isEmpty && !isImageId(word)) this.images.push(word)
	}
}
var FlowText = class {
	text = ""
	#depth = 0
	#quote
	#mayQuote = true
	get isClosed() {
		return this.#depth <= 0 && this.#quote === void 0
	}
	add(line) {
		const content = this.#quote === void 0 ? line.replace(/(^|\s)#[^"']*$/, "") : line
		this.text += `${content}
`
		for (let at = 0; at < content.length; at += 1) {
			const character = content.charAt(at)
			if (this.#quote === '"' && character === "\\") at += 1
			else if (this.#quote !== void 0) this.#endQuote(character)
			else this.#take(character)
		}
	}
	#endQuote(character) {
		if (character !== this.#quote) return
		this.#quote = void 0
		this.#mayQuote = character === "'"
	}
	#take(character) {
		if (`"'`.includes(character) && this.#mayQuote) this.#quote = character
		if ("{[".includes(character)) this.#depth += 1
		if ("}]".includes(character)) this.#depth -= 1
		const isSpace = /\s/.test(character)
		this.#mayQuote = "{[,:".includes(character) || (this.#mayQuote && isSpace)
	}
}
function parseYamlLine(line) {
	const [, dashes = "", rest = ""] = /^(\s*(?:-\s+)*)(.*)$/.exec(line) ?? []
	if (rest.startsWith("#")) return {isImage: false, value: "", parentColumn: 0}
	const [, key, value = ""] = /^("[^"]*"|'[^']*'|[^\s"'{[#][^#]*?)\s*:(?:\s+(.*))?$/.exec(rest) ?? []
	if (key === void 0) return {isImage: false, value: rest.trim(), parentColumn: dashes.lastIndexOf("-")}
	const isImage2 = /^(["']?)image\1$/.test(key)
	return {isImage: isImage2, value: value.trim(), parentColumn: dashes.length}
}
function endsQuote(text, quote2) {
	const escapes = quote2 === '"' ? /\\./g : /''/g
	return text.replace(escapes, "").includes(quote2)
}
var FOR_ONE_HOST = ["username", "password", "token", "tlsCert", "tlsKey", "namespace"]
var beginsWith = (name, segments) => `${placeOf(name)}/`.startsWith(`${segments}/`)
function renameImage(name, renames) {
	const place = placeOf(name)
	const [from] = Object.keys(renames)
		.filter(key => beginsWith(name, key))
		.sort((left, right) => right.length - left.length)
	if (from === void 0) return name
	const version = formatReference(name).slice(place.length)
	const renamed = `${renames[from]}${place.slice(from.length)}${version}`
	try {
		return parseReference(renamed)
	} catch (error) {
		const reason = error.message
		return fail("BAD_OPTION", `\`renames\` ${from}: ${reason}`, {cause: error})
	}
}
async function nameImages(texts, options) {
	const {name: chosenName, namespace, renames = {}} = options
	if (texts.length === 0) fail("BAD_REFERENCE", "no image reference is given")
	const references = await mapConcurrently(texts, 1, async text => parseReference(text))
	const hosts = [...new Set(references.map(({host}) => host))]
	const bound = FOR_ONE_HOST.find(option => options[option] !== void 0)
	if (hosts.length > 1 && bound)
		fail("BAD_OPTION", `\`${bound}\` belongs to one registry, and the images are on ${hosts.join(", ")}`)
	const unique = new Map(references.map(reference => [formatReference(reference), reference]))
	if (chosenName !== void 0 && unique.size > 1)
		fail("BAD_OPTION", `\`name\` goes with one image, not with ${unique.size}`)
	const names = /* @__PURE__ */ new Set()
	return [...unique.values()].map(reference => {
		const own = renameImage(imageName(reference, namespace), renames)
		const name = formatReference(chosenName === void 0 ? own : parseReference(chosenName))
		if (names.has(name)) fail("BAD_OPTION", `two images would have the name ${name} in the tar: \`renames\` parts them`)
		names.add(name)
		return {reference, name}
	})
}
function warnOfRenames({warn}, images, {renames = {}, namespace}) {
	const names = images.map(({reference}) => imageName(reference, namespace))
	for (const from of Object.keys(renames)) {
		const isUsed = names.some(name => beginsWith(name, from))
		if (!isUsed) warn(`\`renames\`: no name begins with ${printable(from)}`)
	}
}
function warnOfLayers({warn}, images) {
	for (const {contents, name} of images) {
		if (contents.some(content => claimsImage(content.manifest) && !isImageContent(content)))
			warn(`${name} is no image that loads: its config has not one diff_id for each layer`)
		const types = contents.flatMap(({manifest}) => manifest.layers.map(({mediaType}) => mediaType)).join(" ")
		if (/zstd/.test(types)) warn(`${name} has zstd layers: Docker before 23 and podman before 4 will not load it`)
		if (/\+encrypted/.test(types)) warn(`${name} has encrypted layers, which load only where their key is`)
		if (/foreign|nondistributable/.test(types)) warn(`${name} has foreign layers, which Docker on Linux does not take`)
	}
}
function warnOfBareImages({warn}, images) {
	const bare = images.filter(({companions}) => companions?.length === 0)
	const [image] = bare
	if (!image) return
	const which = bare.length === 1 ? image.name : counted(bare.length, "image")
	warn(`${which}: no signature, attestation or SBOM was found`)
}
function warnOfCompanions({warn}, images) {
	const companions = images.flatMap(image => image.companions ?? [])
	if (companions.length === 0) return
	const ofIndex = companions.every(isReferrer) ? "" : ", and ctr no --all-platforms"
	warn(
		`${counted(companions.length, "manifest")} of proof beside the images: podman load makes a digest of its own, skopeo wants the name (oci-archive:TAR:NAME)${ofIndex}`
	)
}
function warnOfOmitted({warn}, {omitted}, since) {
	if (omitted.length === 0) {
		warn(`${since} holds none of the layers at the bottom of an image: nothing is left out`)
		return
	}
	const size = formatBytes(sumOf(omitted, layer => layer.size))
	warn(
		`left out ${counted(omitted.length, "layer")} (${size}) that ${since} holds: load that first. docker's containerd store and ctr --no-unpack take this tar without it, in silence`
	)
}
async function chainsIn(since, destination) {
	if (since === void 0) return []
	return withTars([since], async ([base]) => {
		if (!base) return []
		if (destination?.kind === "tar") {
			const target = await fs.stat(destination.file).catch(ignore)
			const {ino, dev} = await base.handle.stat()
			if (target?.ino === ino && target.dev === dev)
				fail("BAD_OPTION", `\`since\` ${since} is DEST: the delta would take the place of its own base`)
		}
		return dockerChains(base)
	})
}
async function withTars(files, run) {
	const tars = []
	try {
		for (const file of files) tars.push(await openTarFile(file))
		return await run(tars)
	} finally {
		await closeTars(tars)
	}
}
async function estimate({entries}, destination, tars) {
	const atHand = destination?.kind === "tar" ? await openAtHand([destination.file]) : []
	const isThere = async ({digest, size}) => {
		if (destination?.kind === "layout") {
			const file = path.join(destination.folder, blobPath(digest))
			const stats = await fs.stat(file).catch(ignore)
			if (stats?.size === size) return true
		}
		return [...tars, ...atHand].some(({blobs}) => blobs.get(digest)?.sizeBytes === size)
	}
	const counts = {fetchedBytes: 0, reusedBytes: 0, resumedBytes: 0}
	for (const {blob} of entries) {
		if (!blob) continue
		const counter = (await isThere(blob.descriptor)) ? "reusedBytes" : "fetchedBytes"
		counts[counter] += blob.descriptor.size
	}
	await closeTars(atHand)
	return counts
}
async function runPull(session, request, observe) {
	const {images: wanted, choice = "one", reuse = [], since, signers = []} = request
	const isProofWanted = request.referrers === true || signers.length > 0
	const named = typeof request.destination === "string" ? request.destination : "the stream"
	const destination = request.destination === void 0 ? void 0 : await parseDestination(request.destination)
	const chains = await chainsIn(since, destination)
	return withTars(reuse, async tars => {
		const {concurrency} = session.settings
		const images = await mapConcurrently(wanted, concurrency, async ({reference, name}) => {
			const image = await resolveImage(session, reference, name, choice)
			return isProofWanted ? addProof(session, image, signers) : image
		})
		const plan = planTar(images, layersToOmit(images, chains), planExtras(images))
		warnOfLayers(session, images)
		warnOfBareImages(session, images)
		if (destination?.kind !== "layout") warnOfCompanions(session, images)
		if (since !== void 0) warnOfOmitted(session, plan, since)
		const sizeBytes = destination?.kind === "layout" ? plan.blobBytes : plan.sizeBytes
		if (request.isDryRun || !destination)
			return {images, plan, sizeBytes, counts: await estimate(plan, destination, tars)}
		const job = {session, plan, tars, observe}
		const transfer = await onDisk(`cannot write ${named}`, pullInto(destination, job))
		return {images, plan, sizeBytes, counts: transfer, transfer}
	})
}
async function readSigner(key) {
	if (key.includes("-----BEGIN")) return parsePublicKey(key, "in `signedBy`")
	const pem = await readBeginning(key, LIMITS.keyFileBytes).catch(error =>
		fail("BAD_OPTION", `cannot read \`signedBy\` ${key}: ${diskWords(error)}`)
	)
	return parsePublicKey(pem.toString("utf8"), key)
}
async function readBeginning(file, maximumBytes) {
	const handle = await fs.open(file, "r")
	try {
		return await readAt(handle, "here", maximumBytes)
	} finally {
		await handle.close()
	}
}
async function readSigners(keys) {
	if (keys?.length === 0) fail("BAD_OPTION", "`signedBy` is an empty list")
	return mapConcurrently(keys ?? [], 1, readSigner)
}
function pulledImage({reference, name, top, platform, contents}) {
	const {digest} = top
	return {
		reference: formatReference(reference),
		pinned: formatReference({...reference, digest}),
		name,
		digest,
		platform,
		layers: sumOf(contents, ({manifest}) => manifest.layers.length)
	}
}
function checkDest(dest, isDryRun) {
	if (dest === void 0 && isDryRun) return
	const isStream = typeof dest?.write === "function"
	const isPath = typeof dest === "string" && dest !== "" && !hasNul(dest)
	checkOption(isStream || isPath, "`dest` has to be a path or a Writable")
}
async function pullImages(references, dest, options = {}) {
	checkOptions(options)
	if (!isStringList(references)) fail("BAD_OPTION", "`references` has to be a list of strings")
	const {dryRun: isDryRun = false, referrers = false, reuse = [], since} = options
	checkDest(dest, isDryRun)
	const images = await nameImages(references, options)
	const signers = await readSigners(options.signedBy)
	return withSession(options, async (session, onProgress) => {
		const {observe, finish} = progressReporter(onProgress)
		warnOfRenames(session, images, options)
		const destination = dest
		const what = {images, destination, choice: choiceOf(options), isDryRun}
		const pulled = await runPull(session, {...what, reuse, since, referrers, signers}, observe)
		if (pulled.transfer) finish(pulled.transfer)
		const {fetchedBytes, reusedBytes, resumedBytes} = pulled.counts
		return {
			images: pulled.images.map(pulledImage),
			sizeBytes: pulled.sizeBytes,
			fetchedBytes,
			reusedBytes,
			resumedBytes,
			isUnchanged: pulled.transfer?.isUnchanged ?? false,
			omitted: pulled.plan.omitted
		}
	})
}
function newPullerOpts(url) {
	const {os: osType, architecture: archType} = hostPlatform()
	return {url, scheme: "https", osType, archType}
}
var Puller = class {
	#opts
	#reference
	constructor(urlOrOpts) {
		const opts = typeof urlOrOpts === "string" ? {url: urlOrOpts} : urlOrOpts
		settingsOf(opts)
		if (opts.url === void 0) fail("BAD_OPTION", "`url` is missing: the image's reference")
		this.#reference = parseReference(opts.url)
		this.#opts = {...opts}
	}
	getUrl() {
		return this.#opts.url
	}
	getOpts() {
		const {timeoutMs, retries, insecure} = settingsOf(this.#opts)
		const isByPlatforms = this.#opts.platforms !== void 0
		const {os: osType, architecture: archType} = wantedPlatform(wantedOf(this.#opts))
		const platform = isByPlatforms ? {} : {osType, archType}
		const defaults = {scheme: "https", insecure, retries, timeoutMs, ...platform}
		return {...defaults, ...dropEmpty(this.#opts), url: this.#opts.url}
	}
	async pullTar(dest) {
		const {images, sizeBytes, fetchedBytes} = await pullImages([this.#opts.url], dest, this.#opts)
		const {name, digest, platform, layers} = images[0]
		return {name, digest, platform, layers, sizeBytes, fetchedBytes}
	}
	async pullManifest(type) {
		if (type === "image") {
			const isOne = choiceOf(this.#opts) === "one"
			checkOption(isOne, "`platforms` names several, and a manifest is of one image")
			return withSession(this.#opts, async session => {
				const image = await resolveImage(session, this.#reference, "", "one")
				await this.#checkSigned(session, [image.asked.digest, image.top.digest])
				return this.#holder(image.top)
			})
		}
		if (type !== "list") fail("BAD_OPTION", `a manifest is "list" or "image", not "${printable(String(type))}"`)
		const holder = await this.getManifest()
		if (isRecord(holder.manifest) && "manifests" in holder.manifest) return holder
		const where = formatReference(this.#reference)
		return fail("NOT_FOUND", `${where} is one image, without a list: ask for \`manifest\` image`)
	}
	getManifest() {
		return withSession(this.#opts, async session => {
			const registry = registryOf(session, this.#reference)
			const fetched = await registry.manifest(versionOf(this.#reference))
			parseManifest(fetched, this.#opts.url)
			await this.#checkSigned(session, [fetched.digest])
			return this.#holder(fetched)
		})
	}
	headManifest() {
		return withSession(this.#opts, async session => {
			const registry = registryOf(session, this.#reference)
			const wanted = versionOf(this.#reference)
			const head = await registry.head(wanted)
			const isRight = head && (!isDigest(wanted) || head.digest === wanted)
			const {mediaType, digest, size} = isRight ? head : await describe()
			await this.#checkSigned(session, [digest])
			return {mediaType, digest, size}
			async function describe() {
				const manifest = await registry.manifest(wanted)
				return {...manifest, size: manifest.bytes.length}
			}
		})
	}
	async pullBlobs(holder, dir) {
		checkOption(holder?.bytes instanceof Uint8Array, "`holder` is what pullManifest() gives")
		checkDest(dir, false)
		const fetched = {...holder, bytes: Buffer.from(holder.bytes)}
		await withSession(this.#opts, (session, onProgress) =>
			withTars(this.#opts.reuse ?? [], async tars => {
				const manifest = parseManifest(fetched, holder.imageUrl)
				if (manifest.kind !== "image")
					return fail("NOT_AN_IMAGE", `${holder.imageUrl}: a list of manifests has no blobs`)
				const descriptors = [manifest.config, ...manifest.layers]
				const unique = new Map(descriptors.map(descriptor => [descriptor.digest, descriptor]))
				const {observe, finish} = progressReporter(onProgress)
				const registry = registryOf(session, this.#reference)
				await this.#checkSigned(session, await this.#digestsAbove(session, fetched))
				const remote = [...unique.values()].filter(({data}) => data === void 0)
				const blobs = remote.map(descriptor => new BlobState(descriptor, registry, 0, tars))
				const doing = `cannot write ${dir}`
				const filling = inFolder(dir, async () => {
					for (const {digest, data} of unique.values())
						if (data) await fs.writeFile(path.join(dir, hexOf(digest)), data)
					return pullToFolder({session, blobs, folder: dir, nameOf: hexOf, observe})
				})
				finish(await onDisk(doing, filling))
			})
		)
	}
	async #checkSigned(session, digests) {
		const signers = await readSigners(this.#opts.signedBy)
		const registry = registryOf(session, this.#reference)
		const where = formatReference(this.#reference)
		await findSignature(session, {registry, where, digests: [...new Set(digests)]}, signers)
	}
	async #digestsAbove(session, {digest, bytes}) {
		const own = digestOf(bytes, digest)
		if (!this.#opts.signedBy?.length) return [own]
		const registry = registryOf(session, this.#reference)
		const where = formatReference(this.#reference)
		const asked = await registry.manifest(versionOf(this.#reference))
		const above = await pathTo(own, asked, childrenOf(registry, where), where)
		return above ? [asked.digest, own] : [own]
	}
	#holder({mediaType, digest, bytes}) {
		return {mediaType, digest, bytes, manifest: parseJson(bytes), imageUrl: this.#opts.url}
	}
}
var nameOfSource = source => (typeof source === "string" ? source : "-")
async function openTarSource(source, signal) {
	if (typeof source !== "string") return openStream(nameOfSource(source), readableOf(source), signal)
	const stats = await fs.stat(source)
	if (stats.isDirectory()) return openFolder(source)
	if (stats.isFIFO()) return openStream(source, await openPipe(source, signal), signal)
	if (!stats.isFile() && !stats.isCharacterDevice()) return fail("BAD_TAR", `${source}: it is not a file`)
	const handle = await fs.open(source, "r")
	const isPacked = packingOf(await readAt(handle, 0, BLOCK)) !== void 0
	if (stats.isFile() && !isPacked) return openFile(source, handle, stats.size)
	const chunks = handle.createReadStream({highWaterMark: TUNING.batchBytes})
	try {
		return {...(await openStream(source, chunks, signal)), sizeBytes: stats.size}
	} catch (error) {
		chunks.destroy()
		throw error
	}
}
var readableOf = source => (source instanceof Readable ? source : Readable.from(source, {objectMode: false}))
async function openPipe(file, signal) {
	if (signal?.aborted) stopped(signal.reason)
	let isOver = false
	const letGo = async () => {
		while (!isOver) {
			const writer = await fs.open(file, O_WRONLY | O_NONBLOCK).catch(ignore)
			await writer?.close()
			await delay(TUNING.readerPollMs)
		}
	}
	signal?.addEventListener("abort", letGo, {once: true})
	try {
		const descriptor = await openDescriptor(file)
		return new net.Socket({fd: descriptor, readable: true, writable: false})
	} finally {
		isOver = true
		signal?.removeEventListener("abort", letGo)
	}
}
var openDescriptor = file =>
	new Promise((resolve2, reject) => {
		openCallback(file, "r", (error, descriptor) => (error ? reject(error) : resolve2(descriptor)))
	})
function openFile(where, handle, sizeBytes) {
	let decoder = new TarDecoder()
	async function* members() {
		decoder = new TarDecoder()
		for await (const entry of readTar(handle, where, decoder)) {
			const end = entry.offset + entry.sizeBytes
			yield {entry, content: () => fillHoles(readPlace(handle, entry.offset, end), entry.holes)}
		}
	}
	return {
		where,
		isSeekable: true,
		sizeBytes,
		readBytes: () => sizeBytes,
		position: () => sizeBytes,
		hasTrailer: () => decoder.hasTrailer,
		members,
		close: () => handle.close()
	}
}
var PLAIN_FILE = {type: "0", linkName: "", isRooted: false, offset: 0}
async function openFolder(folder) {
	const files = ["oci-layout", "index.json", "manifest.json"]
	for (const algorithm of await listOptional(path.join(folder, "blobs")))
		for (const name of await listOptional(path.join(folder, "blobs", algorithm)))
			files.push(`blobs/${algorithm}/${name}`)
	const entries = []
	for (const name of files) {
		const stats = await fs.stat(path.join(folder, name)).catch(ignore)
		if (stats?.isFile()) entries.push({...PLAIN_FILE, name, sizeBytes: stats.size})
	}
	async function* contentOf({name, sizeBytes}) {
		const handle = await fs.open(path.join(folder, name), "r")
		try {
			yield* readPlace(handle, 0, sizeBytes)
		} finally {
			await handle.close()
		}
	}
	async function* members() {
		for (const entry of entries) yield {entry, content: () => contentOf(entry)}
	}
	const sizeOfAll = sumOf(entries, ({sizeBytes}) => sizeBytes)
	return {
		where: folder,
		isSeekable: true,
		isFolder: true,
		sizeBytes: sizeOfAll,
		readBytes: () => sizeOfAll,
		position: () => sizeOfAll,
		hasTrailer: () => true,
		members,
		close: async () => void 0
	}
}
async function openStream(where, stream, signal) {
	if (signal) addAbortSignal(signal, stream)
	const decoder = new TarDecoder()
	const packed = new ByteReader(stream)
	const beginning = await packed.peek(BLOCK)
	const packing = packingOf(beginning)
	const isSkippable = packing === "zstd" && beginning[0] !== ZSTD_FRAME
	const unpacker = packing && unpackerFor(packing)
	if (packing && !unpacker) fail("BAD_TAR", `${where}: it is compressed (${packing}), which cannot be read here`)
	const bytes = unpacker ? new ByteReader(unpackWhole(packed, packing, unpacker)) : packed
	async function* contentUntil(end, name) {
		yield* bytes.piecesUntil(end)
		if (bytes.position < end) refuseTar(cutWithin(name, bytes.position))
	}
	async function* members() {
		while (!decoder.isAtEnd) {
			const {wantedBytes} = decoder
			const block = await bytes.read(wantedBytes)
			if (block.length === 0) break
			if (block.length < wantedBytes) refuseTar(cutWithin("a header", bytes.position))
			const header = takeAt(decoder, block, bytes.position - wantedBytes)
			if (!header) continue
			const offset = bytes.position
			const end = offset + header.sizeBytes
			const entry = entryAt(header, offset)
			yield {entry, content: () => fillHoles(contentUntil(end, entry.name), header.holes)}
			await bytes.skipTo(end)
			if (bytes.position < end) refuseTar(cutWithin(entry.name, bytes.position))
			await bytes.skipTo(end + paddingOf(end))
		}
		await bytes.skipTo(NEVER)
	}
	return {
		where,
		isSeekable: false,
		sizeBytes: void 0,
		packing,
		isOddlyPacked: () => isSkippable || (unpacker !== void 0 && unpacker.bytesWritten < packed.position),
		readBytes: () => packed.position,
		position: () => bytes.position,
		hasTrailer: () => decoder.hasTrailer,
		members,
		close: async () => {
			stream.destroy()
		}
	}
}
var ByteReader = class {
	position = 0
	#chunks
	#ahead = Buffer.alloc(0)
	constructor(source) {
		this.#chunks = source[Symbol.asyncIterator]()
	}
	async peek(length) {
		const chunks = [this.#ahead]
		let aheadBytes = this.#ahead.length
		while (aheadBytes < length) {
			const {value, done} = await this.#chunks.next()
			if (done) break
			chunks.push(value)
			aheadBytes += value.length
		}
		if (chunks.length > 1) this.#ahead = joined(chunks)
		return this.#ahead.subarray(0, length)
	}
	async read(length) {
		const bytes = await this.peek(length)
		this.#take(bytes.length)
		return bytes
	}
	async *piecesUntil(end) {
		while (this.position < end) {
			const next = await this.peek(1)
			if (next.length === 0) return
			const piece = this.#ahead.subarray(0, end - this.position)
			this.#take(piece.length)
			yield piece
		}
	}
	async skipTo(position) {
		for await (const _piece of this.piecesUntil(position));
	}
	#take(length) {
		this.#ahead = this.#ahead.subarray(length)
		this.position += length
	}
}
function joined(chunks) {
	const filled = chunks.filter(({length}) => length > 0)
	const [only = Buffer.alloc(0)] = filled
	return filled.length < 2 ? only : Buffer.concat(filled)
}
async function* fillHoles(stored, holes) {
	if (!holes) return yield* stored
	const bytes = new ByteReader(stored)
	const zeros = Buffer.alloc(TUNING.headerReadBytes)
	let position = 0
	for (const [from, to] of [...holes.pieces, [holes.realBytes, holes.realBytes]]) {
		for (; position < from; position += zeros.length) yield zeros.subarray(0, from - position)
		yield* bytes.piecesUntil(bytes.position + to - from)
		position = to
	}
}
var lengthOfEntry = ({holes, sizeBytes}) => holes?.realBytes ?? sizeBytes
function unpackerFor(packing, packedBytes = NEVER) {
	const {createGunzip, createZstdDecompress} = load("node:zlib")
	const isSmall = packedBytes < TUNING.headerReadBytes
	const options = {chunkSize: isSmall ? TUNING.unpackBytes / 16 : TUNING.unpackBytes}
	if (packing === "gzip") return createGunzip?.(options)
	if (packing === "zstd") return createZstdDecompress?.(options)
	return void 0
}
var isUnpackError = error => errorCodeOf(error).startsWith("Z")
var isEndless = (unpackedBytes, packedBytes) =>
	unpackedBytes > LIMITS.unpackFactor * packedBytes + LIMITS.unpackFloorBytes
var LookBudget = class {
	#readBytes
	#spentBytes = 0
	constructor({readBytes}) {
		this.#readBytes = readBytes
	}
	spend(bytes) {
		this.#spentBytes += bytes
		if (isEndless(this.#spentBytes / 2, this.#readBytes()))
			refuseTar(`its files unpack, all together, to more than ${LIMITS.unpackFactor} times its size`)
	}
}
async function* unpackWhole(packed, packing, unpacker) {
	const feeding = pipeline(packed.piecesUntil(NEVER), unpacker).catch(ignore)
	let unpackedBytes = 0
	try {
		for await (const chunk of unpacker) {
			unpackedBytes += chunk.length
			if (isEndless(unpackedBytes, packed.position))
				refuseTar(`it unpacks to more than ${LIMITS.unpackFactor} times its size`)
			yield chunk
		}
		if (packing === "zstd" && unpacker.bytesWritten < packed.position)
			refuseTar("bytes follow its first zstd frame, which this Node does not read (nodejs/node#64741)")
	} catch (error) {
		const words = `its compression is damaged, or it was cut off, near byte ${unpacker.bytesWritten}`
		throw isUnpackError(error) ? new ImgpullError("BAD_TAR", words, {cause: error}) : error
	} finally {
		unpacker.destroy()
		await feeding
	}
}
var Digests = class {
	#hashes
	constructor(algorithms) {
		this.#hashes = algorithms.map(algorithm => [algorithm, newHash(`${algorithm}:`)])
	}
	update(bytes) {
		for (const [, hash] of this.#hashes) hash.update(bytes)
	}
	list() {
		return this.#hashes.map(([algorithm, hash]) => `${algorithm}:${hash.digest("hex")}`)
	}
}
var UNPACKED_TYPES = "0123456S"
function isUnpackable({name, type, linkName, attributes}) {
	const isFile = "015S".includes(type)
	const isLinkWrong = type === "2" && (linkName === "" || Buffer.byteLength(linkName) > LIMITS.unpackedLinkBytes)
	if (isLinkWrong || attributes === "for-none" || (attributes && !isFile)) return false
	if (3 * name.length <= LIMITS.unpackedNameBytes) return true
	const lengths = name.split("/").map(part => Buffer.byteLength(part))
	return (
		Math.max(...lengths) <= LIMITS.unpackedNameBytes && sumOf(lengths, length => length + 1) <= LIMITS.unpackedPathBytes
	)
}
var GONE = 1
var FOLDER = 2
var FILE = 3
var LINK = 4
var ENTERED = 8
var PathTable = class {
	count = 0
	#seed = Math.floor(Math.random() * 2 ** 32)
	#hashes = new Float64Array(256)
	#values = new Uint8Array(256)
	get(path2) {
		return this.#values[this.#slotOf(this.#hashOf(path2))] ?? 0
	}
	set(path2, value) {
		this.#put(this.#hashOf(path2), value)
		if (2 * this.count > this.#values.length) this.#grow()
	}
	#put(hash, value) {
		const slot = this.#slotOf(hash)
		if (this.#values[slot] === 0) this.count += 1
		this.#hashes[slot] = hash
		this.#values[slot] = value
	}
	#slotOf(hash) {
		const size = this.#values.length
		let slot = hash % size
		while (this.#values[slot] !== 0 && this.#hashes[slot] !== hash) slot = (slot + 1) % size
		return slot
	}
	#grow() {
		const hashes = this.#hashes
		const values = this.#values
		this.#hashes = new Float64Array(2 * hashes.length)
		this.#values = new Uint8Array(2 * values.length)
		this.count = 0
		for (const [slot, value] of values.entries()) if (value) this.#put(hashes[slot] ?? 0, value)
	}
	#hashOf(path2) {
		let high = this.#seed
		let low = ~this.#seed
		for (let at = 0; at < path2.length; at += 1) {
			const letter = path2.charCodeAt(at)
			high = Math.imul(high ^ letter, 2654435761)
			low = Math.imul(low ^ letter, 1597334677)
			low ^= low >>> 15
		}
		high = Math.imul(high ^ (high >>> 16), 2246822507) ^ Math.imul(low ^ (low >>> 13), 3266489909)
		return (high & 2097151) * 2 ** 32 + (low >>> 0)
	}
}
var WHITEOUT = ".wh."
var OPAQUE = ".wh..wh..opq"
var pathBelowRoot = name => path.posix.join("/", name).replace(/^\/|\/$/g, "")
var UnpackTrial = class {
	odd
	#paths = new PathTable()
	#targets = /* @__PURE__ */ new Map()
	#budget
	#targetBytes = 0
	constructor(budget) {
		this.#budget = budget
	}
	take(header) {
		if (this.odd?.kind === "odd-path") return
		const kind = this.#kindOf(header)
		if (kind === "odd-path" || (kind && !this.odd)) this.odd = {kind, path: header.name}
	}
	#kindOf(header) {
		const full = this.#paths.count > LIMITS.layerPaths || this.#targetBytes > LIMITS.layerLinkBytes
		if (full || !isUnpackable(header)) return "odd-path"
		const given = pathBelowRoot(header.name)
		const folder = this.#follow(parentOf(given))
		if (folder === void 0) return "odd-path"
		const ofFolder = this.#enterFolder(folder, folder !== parentOf(given))
		const base = path.posix.basename(given)
		const place = folder === "" ? base : `${folder}/${base}`
		const isTwice = (this.#paths.get(given) & ENTERED) !== 0
		const ofEntry = base.startsWith(WHITEOUT) ? this.#remove(folder, base) : this.#put(place, header)
		this.#paths.set(given, this.#paths.get(given) | ENTERED)
		const kinds = [ofFolder, ofEntry, isTwice ? "path-twice" : void 0]
		return kinds.find(kind => kind === "odd-path") ?? kinds.find(kind => kind)
	}
	#foldersOf(place) {
		const parts = place.split("/")
		this.#budget.spend(place.length * parts.length)
		return parts.map((_, at) => parts.slice(0, at + 1).join("/"))
	}
	#standsAt(place) {
		return place === "" ? FOLDER : this.#paths.get(place) & ~ENTERED
	}
	#follow(given) {
		let place = given
		for (let steps = 0; steps < 40 && place.length <= LIMITS.unpackedPathBytes; steps += 1) {
			const link = this.#targets.size > 0 ? this.#firstLink(place) : void 0
			if (link === void 0) return place
			const target = this.#targets.get(link) ?? ""
			const from = target.startsWith("/") ? "" : parentOf(link)
			place = pathBelowRoot(`${from}/${target}${place.slice(link.length)}`)
		}
		return void 0
	}
	#firstLink(place) {
		if (this.#standsAt(place) === FOLDER) return void 0
		return this.#foldersOf(place).find(each => this.#standsAt(each) === LINK)
	}
	#enterFolder(folder, isBehindLink) {
		const stands = this.#standsAt(folder)
		if (stands === FOLDER) return void 0
		const folders = this.#foldersOf(folder)
		const isBelowFile = folders.some(each => this.#standsAt(each) === FILE)
		const isBelowGone = folders.some(each => this.#standsAt(each) === GONE)
		for (const each of folders) this.#paths.set(each, (this.#paths.get(each) & ENTERED) | FOLDER)
		if (isBelowFile) return "odd-path"
		return isBelowGone || isBehindLink ? "path-twice" : void 0
	}
	#remove(folder, base) {
		if (base === OPAQUE) return void 0
		const name = base.slice(WHITEOUT.length)
		if (["", ".", ".."].includes(name)) return "odd-path"
		const place = folder === "" ? name : `${folder}/${name}`
		const before = this.#standsAt(place)
		this.#paths.set(place, (this.#paths.get(place) & ENTERED) | GONE)
		if (before === FOLDER) return "odd-path"
		return before === 0 ? void 0 : "path-twice"
	}
	#put(place, {type, linkName}) {
		if (place === "") return type === "5" ? void 0 : "path-twice"
		const isGood = type !== "1" || this.#isFile(linkName, place)
		const before = this.#standsAt(place)
		const stands = {5: FOLDER, 2: LINK}[type] ?? FILE
		this.#paths.set(place, (this.#paths.get(place) & ENTERED) | stands)
		if (stands === LINK) {
			this.#targets.set(place, linkName)
			this.#targetBytes += place.length + linkName.length
		}
		return isGood && (before !== FOLDER || stands === FOLDER) ? void 0 : "odd-path"
	}
	#isFile(linkName, place) {
		const target = pathBelowRoot(linkName)
		const folder = this.#follow(parentOf(target))
		if (folder === void 0 || target === "") return false
		const base = path.posix.basename(target)
		const targetPlace = folder === "" ? base : `${folder}/${base}`
		return targetPlace !== place && [FILE, LINK].includes(this.#standsAt(targetPlace))
	}
}
var TarCheck = class {
	#decoder = new TarDecoder()
	#budget
	#trial
	#block = Buffer.alloc(0)
	#contentBytes = 0
	#paddingBytes = 0
	#isBroken = false
	constructor(budget) {
		this.#budget = budget
	}
	push(chunk) {
		let at = 0
		while (at < chunk.length && !this.#isBroken && !this.#decoder.isAtEnd) {
			const passed = this.#passOver(chunk.length - at)
			at += passed > 0 ? passed : this.#gather(chunk, at)
		}
	}
	isTar() {
		return !this.#isBroken && this.#contentBytes === 0 && this.#block.length === 0
	}
	odd() {
		const odd = this.#trial?.odd
		if (odd || this.#decoder.globalHeaders < 2) return odd
		return {kind: "path-twice", path: "pax_global_header"}
	}
	#passOver(availableBytes) {
		const contentBytes2 = Math.min(this.#contentBytes, availableBytes)
		const paddingBytes = Math.min(this.#paddingBytes, availableBytes - contentBytes2)
		this.#contentBytes -= contentBytes2
		this.#paddingBytes -= paddingBytes
		return contentBytes2 + paddingBytes
	}
	#gather(chunk, at) {
		const missingBytes = this.#decoder.wantedBytes - this.#block.length
		const piece = chunk.subarray(at, at + missingBytes)
		this.#block = this.#block.length === 0 ? piece : Buffer.concat([this.#block, piece])
		if (piece.length === missingBytes) this.#takeBlock()
		return piece.length
	}
	#takeBlock() {
		const recordsBefore = this.#decoder.recordCount
		const header = this.#decode()
		const records = this.#decoder.recordCount - recordsBefore
		this.#budget.spend(LIMITS.headerCostBytes + records * LIMITS.recordCostBytes)
		this.#block = Buffer.alloc(0)
		this.#contentBytes = header?.sizeBytes ?? 0
		this.#paddingBytes = paddingOf(this.#contentBytes)
		if (!header) return
		this.#isBroken = !UNPACKED_TYPES.includes(header.type)
		this.#trial ??= new UnpackTrial(this.#budget)
		this.#trial.take(header)
	}
	#decode() {
		try {
			return this.#decoder.take(this.#block)
		} catch (error) {
			if (!(error instanceof ImgpullError)) throw error
			this.#isBroken = true
			return void 0
		}
	}
}
var LayerUnpacking = class {
	#packing
	#unpacker
	#digests
	#budget
	#tar
	#reading
	#packedBytes = 0
	#isOver = false
	constructor(packing, unpacker, algorithms, budget) {
		this.#packing = packing
		this.#unpacker = unpacker
		this.#digests = new Digests(algorithms)
		this.#budget = budget
		this.#tar = new TarCheck(budget)
		unpacker.on("error", ignore)
		this.#reading = this.#read()
		this.#reading.catch(ignore)
	}
	async write(piece) {
		this.#packedBytes += piece.length
		if (this.#isOver || this.#unpacker.write(piece)) return
		await Promise.race([once(this.#unpacker, "drain").catch(ignore), this.#reading])
	}
	async end() {
		if (!this.#isOver) this.#unpacker.end()
		const outcome = await this.#reading
		return {
			packing: this.#packing,
			outcome,
			digests: this.#digests.list(),
			isTar: this.#tar.isTar(),
			odd: this.#tar.odd(),
			hasRest: this.#unpacker.bytesWritten < this.#packedBytes
		}
	}
	async #read() {
		let unpackedBytes = 0
		try {
			for await (const chunk of this.#unpacker) {
				unpackedBytes += chunk.length
				if (isEndless(unpackedBytes, this.#packedBytes)) return "endless"
				this.#budget.spend(chunk.length)
				this.#digests.update(chunk)
				this.#tar.push(chunk)
			}
			return "whole"
		} catch (error) {
			if (!isUnpackError(error)) throw error
			return "broken"
		} finally {
			this.#isOver = true
		}
	}
}
var DOCUMENT_NAMES = ["index.json", "manifest.json", "oci-layout"]
var Look = class {
	#source
	#budget
	#options
	#names = new TarNames()
	#files = /* @__PURE__ */ new Map()
	#problems = []
	#keptBytes = 0
	#largeDocuments = []
	#doneBytes = 0
	constructor(source, options) {
		this.#source = source
		this.#budget = new LookBudget(source)
		this.#options = options
	}
	async run(withContent) {
		await this.#readMembers(withContent).catch(error => {
			if (!(error instanceof ImgpullError) || error.code !== "BAD_TAR") throw error
			const reason = error.message.replace(`${this.#source.where}: `, "")
			this.#problems.push({kind: "unreadable", reason})
		})
		const isWhole = this.#problems.length === 0 && this.#names.entries.size > 0
		const source = this.#source
		if (isWhole && !source.hasTrailer()) this.#problems.push({kind: "cut-off", atByte: source.position()})
		return {
			where: source.where,
			isFolder: source.isFolder === true,
			packing: source.packing,
			isOddlyPacked: source.isOddlyPacked?.() === true,
			names: this.#names,
			files: this.#files,
			problems: this.#problems
		}
	}
	async #readMembers(withContent) {
		const lanes = this.#source.isSeekable ? TUNING.unpackLanes : 1
		const running = /* @__PURE__ */ new Set()
		try {
			for await (const member of this.#source.members()) {
				this.#checkStopped()
				const {entry} = member
				const problem = this.#names.add(entry)
				if (problem) this.#problems.push(problem)
				if (problem?.kind === "too-many-entries") return
				if (problem || !"0S".includes(entry.type)) continue
				const reading = this.#readMember(member, withContent)
				const run = reading.finally(() => running.delete(run))
				run.catch(ignore)
				running.add(run)
				if (running.size >= lanes) await Promise.race(running)
			}
		} finally {
			settled(await Promise.allSettled(running))
		}
	}
	async #readMember(member, withContent) {
		const {entry} = member
		const seen = withContent ? await this.#inspect(member) : await this.#readDocument(member)
		const bytes = this.#kept(entry.name, seen.bytes)
		this.#files.set(entry.name, {
			entry: seen.entry,
			isIntact: seen.isIntact,
			bytes,
			isLeftOut: bytes === void 0 && seen.bytes !== void 0,
			unpacked: seen.unpacked
		})
	}
	async #readDocument({entry, content}) {
		const seen = {entry, isIntact: true, unpacked: void 0}
		if (lengthOfEntry(entry) > LIMITS.tarMetadataBytes) return {...seen, bytes: void 0}
		const pieces = []
		for await (const piece of content()) {
			this.#checkStopped()
			this.#budget.spend(piece.length + LIMITS.pieceCostBytes)
			if (pieces.length === 0 && !mayBeDocument(entry, piece)) break
			pieces.push(piece)
		}
		return {...seen, bytes: joinedDocument(pieces)}
	}
	async #inspect({entry, content}) {
		const inspection = new FileInspection(entry, this.#budget)
		for await (const piece of content()) {
			this.#checkStopped()
			await inspection.add(piece)
			this.#doneBytes += piece.length
			this.#options.onProgress?.({
				doneBytes: this.#doneBytes,
				totalBytes: this.#source.sizeBytes
			})
			if (inspection.isEndless()) break
		}
		const {documentPieces, ...seen} = await inspection.end()
		return {...seen, bytes: joinedDocument(documentPieces)}
	}
	#kept(name, bytes) {
		if (!bytes) return void 0
		const sizeBytes = bytes.length
		const isLarge = sizeBytes > LIMITS.tarSmallDocumentBytes
		while (!isLarge && this.#keptBytes + sizeBytes > LIMITS.tarDocumentBytes) {
			const large = this.#largeDocuments.pop()
			const file = large === void 0 ? void 0 : this.#files.get(large)
			if (large === void 0) return void 0
			if (!file?.bytes) continue
			this.#keptBytes -= file.bytes.length
			this.#files.set(large, {...file, bytes: void 0, isLeftOut: true})
		}
		if (this.#keptBytes + sizeBytes > LIMITS.tarDocumentBytes) return void 0
		this.#keptBytes += sizeBytes
		if (isLarge) this.#largeDocuments.push(name)
		return bytes
	}
	#checkStopped() {
		const {signal} = this.#options
		if (signal?.aborted) stopped(signal.reason)
	}
}
var FileInspection = class {
	#entry
	#claimed
	#algorithms
	#digests
	#budget
	#tar
	#documentPieces = []
	#isDocument = false
	#packing
	#unpacking
	#readBytes = 0
	constructor(entry, budget) {
		this.#entry = entry
		this.#budget = budget
		this.#tar = new TarCheck(budget)
		this.#claimed = digestInName(entry.name)
		this.#algorithms = [.../* @__PURE__ */ new Set([algorithmOf(this.#claimed ?? "sha256:"), "sha256"])]
		this.#digests = new Digests(this.#algorithms)
	}
	async add(piece) {
		if (this.#readBytes === 0) this.#begin(piece)
		this.#readBytes += piece.length
		if (!this.isEndless()) this.#budget.spend(piece.length + LIMITS.pieceCostBytes)
		this.#digests.update(piece)
		if (this.#isDocument) this.#documentPieces.push(piece)
		if (!this.#packing) this.#tar.push(piece)
		await this.#unpacking?.write(piece)
	}
	isEndless() {
		return isEndless(this.#readBytes, this.#entry.sizeBytes)
	}
	async end() {
		const hashed = this.#digests.list()
		const digests = hashed.map(digest => (digest === this.#claimed ? this.#claimed : digest))
		const unpacked = (await this.#unpacking?.end()) ?? this.#asItIs(digests)
		return {
			entry: this.#entry,
			isIntact: this.#claimed === void 0 || digests.includes(this.#claimed),
			unpacked,
			documentPieces: this.#documentPieces
		}
	}
	#begin(firstPiece) {
		this.#isDocument = mayBeDocument(this.#entry, firstPiece)
		this.#packing = packingOf(firstPiece)
		const unpacker = this.#packing && unpackerFor(this.#packing, this.#entry.sizeBytes)
		if (this.#packing && unpacker)
			this.#unpacking = new LayerUnpacking(this.#packing, unpacker, this.#algorithms, this.#budget)
	}
	#asItIs(digests) {
		const outcome = this.#packing ? "not-unpacked" : "whole"
		return {
			packing: this.#packing,
			outcome: this.isEndless() ? "endless" : outcome,
			digests,
			isTar: this.#tar.isTar(),
			odd: this.#tar.odd(),
			hasRest: false
		}
	}
}
var joinedDocument = pieces => (pieces.length === 0 ? void 0 : Buffer.concat(pieces))
function mayBeDocument(entry, firstPiece) {
	if (lengthOfEntry(entry) > LIMITS.tarMetadataBytes) return false
	const beginning = firstPiece.toString("latin1", 0, 64).trimStart()
	return DOCUMENT_NAMES.includes(entry.name) || beginning.startsWith("{") || beginning.startsWith("[")
}
var BaseTar = class {
	#files = /* @__PURE__ */ new Map()
	#chains
	constructor(contents) {
		for (const seen of contents.files.values()) {
			const digest = digestInName(seen.entry.name)
			if (digest !== void 0 && seen.isIntact) this.#files.set(digest, seen)
		}
		this.#chains = chainsOf(new TarDocuments(contents).json("manifest.json"))
	}
	layer(name) {
		const digest = digestInName(name)
		return digest === void 0 ? void 0 : this.#files.get(digest)
	}
	hasChain(layers) {
		return this.#chains.some(chain => layers.every((layer, at) => digestInName(layer) === chain[at]))
	}
}
var TarDocuments = class {
	problems = []
	#contents
	#manifests = /* @__PURE__ */ new Map()
	#configs = /* @__PURE__ */ new Map()
	#platforms = /* @__PURE__ */ new Map()
	#encrypted = /* @__PURE__ */ new Set()
	base
	constructor(contents, base) {
		this.#contents = contents
		this.base = base
	}
	get form() {
		return this.#contents
	}
	bytes(digest) {
		const seen = this.file(blobPath(digest))
		const isIt = seen?.isIntact && digestInName(seen.entry.name) === digest
		return isIt ? seen.bytes : void 0
	}
	file(name) {
		const entry = this.#contents.names.file(name)
		return entry && this.#contents.files.get(entry.name)
	}
	layer(name) {
		return this.file(name) ?? this.base?.layer(name)
	}
	typeOf(name) {
		return this.#contents.names.entries.get(resolveName(name))?.type
	}
	entries() {
		return this.#contents.names.entries.values()
	}
	isEncrypted(name) {
		return this.#encrypted.has(resolveName(name))
	}
	markEncrypted(name) {
		this.#encrypted.add(name)
	}
	json(name) {
		const seen = this.file(name)
		if (!seen?.isIntact) return void 0
		if (lengthOfEntry(seen.entry) > LIMITS.tarMetadataBytes) return this.#refuse(name, "is too large")
		const parsed = seen.bytes && parseShallowJson(seen.bytes)
		if (parsed !== void 0) return parsed
		return this.#refuse(name, seen.isLeftOut ? NOT_KEPT : NOT_JSON)
	}
	plainJson(name) {
		const json = this.json(name)
		const bytes = json === void 0 ? void 0 : this.file(name)?.bytes
		if (!bytes || !hasClashingKeys(bytes)) return json
		return this.#refuse(name, "has two keys in one object that some readers take for the same")
	}
	manifest({digest, size, mediaType}) {
		const bytes = this.bytes(digest)
		if (bytes && bytes.length !== size) {
			const sizes = {expectedBytes: size, actualBytes: bytes.length}
			this.problems.push({kind: "size", entry: blobPath(digest), ...sizes})
			return void 0
		}
		const known = this.#manifests.get(digest)
		if (known && known.mediaType !== mediaType) return this.#refuse(blobPath(digest), "is said to be of two types")
		if (known) return known.manifest
		const manifest = this.#readManifest(digest, mediaType)
		this.#manifests.set(digest, {mediaType, manifest})
		return manifest
	}
	platformsOf(descriptor, depth = 0) {
		const known = this.#platforms.get(descriptor.digest)
		const manifest = depth > LIMITS.indexDepth ? void 0 : this.manifest(descriptor)
		if (known || manifest?.kind !== "index") return known
		const counts = {here: 0, named: 0, absentManifests: 0, depth: 1}
		this.#platforms.set(descriptor.digest, counts)
		for (const child of manifest.manifests) {
			const isHere = this.file(blobPath(child.digest)) !== void 0
			const isManifest = isManifestType(child)
			const inner = isHere && isManifest ? this.platformsOf(child, depth + 1) : void 0
			const isPlatform = inner === void 0 && isManifest && !isAttestation(child)
			counts.depth = Math.max(counts.depth, 1 + (inner?.depth ?? 0))
			counts.here += inner?.here ?? Number(isPlatform && isHere)
			counts.named += inner?.named ?? Number(isPlatform)
			counts.absentManifests += inner?.absentManifests ?? Number(!isHere)
		}
		return counts
	}
	config(name) {
		if (!this.#configs.has(name)) this.#configs.set(name, this.#readConfig(name))
		return this.#configs.get(name)
	}
	#readManifest(digest, mediaType) {
		const name = blobPath(digest)
		const json = this.json(name)
		const bytes = this.bytes(digest)
		if (json === void 0 || !bytes) return void 0
		if (sniffMediaType(bytes, mediaType) !== mediaType) return this.#refuse(name, "is of another type")
		return this.attempt(name, () => parseManifest({digest, mediaType, bytes}, name))
	}
	#readConfig(name) {
		const json = this.json(name)
		return json === void 0 ? void 0 : configWords(json)
	}
	attempt(entry, run) {
		try {
			return run()
		} catch (error) {
			if (!(error instanceof ImgpullError)) throw error
			const reason = unmarked(error.message).replace(`${entry}: `, "")
			this.problems.push({kind: "malformed", entry, reason})
			return void 0
		}
	}
	#refuse(entry, reason) {
		this.problems.push({kind: "document", entry, reason})
	}
}
var NOT_KEPT = "is one document too many to be held at once"
var NOT_JSON = "is not JSON, or nested too deep or too large to be read"
function hasClashingKeys(json) {
	const keys = []
	let isKeyNext = false
	for (let at = 0; at < json.length; at += 1) {
		const byte = json[at]
		if (byte === OPEN_BRACE) keys.push(/* @__PURE__ */ new Set())
		if (byte === OPEN_BRACKET) keys.push(void 0)
		if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) keys.pop()
		if (byte === OPEN_BRACE || byte === COMMA) isKeyNext = true
		if (byte !== QUOTE) continue
		const start = at
		at = endOfString(json, start)
		const known = keys.at(-1)
		if (!known || !isKeyNext) continue
		isKeyNext = false
		const key = foldCase(String(parseJson(json.subarray(start, at + 1))))
		if (known.has(key)) return true
		known.add(key)
	}
	return false
}
var foldCase = text => text.toUpperCase().toLowerCase()
var ImageFinder = class {
	problems = []
	#documents
	#blobs = /* @__PURE__ */ new Map()
	#found = /* @__PURE__ */ new Map()
	#namedBlobs = 0
	#references = 0
	constructor(documents) {
		this.#documents = documents
	}
	run() {
		const entries = this.#readIndex().map(entry => {
			const images = this.#imagesOf(entry.descriptor)
			const platforms = this.#documents.platformsOf(entry.descriptor)
			return {...entry, images, platforms}
		})
		const found = entries.flatMap(({name, isCompanion, platforms, images}) =>
			images.map(image => ({name, isCompanion, platforms, ...image}))
		)
		const indexes = new Map(
			entries
				.filter(({isCompanion}) => !isCompanion)
				.map(({descriptor}) => [descriptor.digest, this.#documents.platformsOf(descriptor)])
		)
		const listed = this.#readDockerList()
		const isLayout = this.#checkLayout(entries.length > 0, listed.length > 0)
		const isEmpty = entries.every(({isCompanion}) => isCompanion) && listed.length === 0
		const isSaid = this.problems.length + this.#documents.problems.length > 0
		if (isEmpty && !isSaid) this.problems.push({kind: "no-image"})
		return {
			entries,
			indexed: found.filter(({isCompanion}) => !isCompanion),
			companions: found.filter(({isCompanion}) => isCompanion),
			listed,
			blobs: [...this.#blobs.values()],
			indexes: [...indexes.values()].filter(index => index !== void 0),
			isLayout
		}
	}
	#readIndex() {
		const json = this.#documents.plainJson("index.json")
		if (json === void 0) return []
		if (!isRecord(json) || !Array.isArray(json.manifests)) {
			this.problems.push({kind: "document", entry: "index.json", reason: "is not an index"})
			return []
		}
		const entries = []
		for (const value of json.manifests) {
			const descriptor = this.#documents.attempt("index.json", () => parseDescriptor(value, "index.json"))
			if (!descriptor || !this.#count(1)) break
			const annotations = isRecord(value) && isRecord(value.annotations) ? value.annotations : {}
			const names = NAME_KEYS.map(key => annotations[key])
			const name = names.find(each => typeof each === "string" && each !== "") ?? ""
			const refName = typeof names[1] === "string" ? names[1] : ""
			const isNameless = names.every(each => each === void 0 || each === "")
			const isAlone = json.manifests.length === 1
			const isCompanion = isNameless && this.#isProof(descriptor, annotations, isAlone)
			entries.push({descriptor, name: printable(String(name)), refName, isCompanion})
		}
		return entries
	}
	#isProof(descriptor, annotations, isAlone) {
		const hasSubject = typeof annotations[SUBJECT_KEY] === "string"
		if (hasSubject && !isAlone) return true
		if (!hasSubject && !isCosignProof(annotations)) return false
		return !this.#imagesOf(descriptor).some(({isImage: isImage2}) => isImage2)
	}
	#imagesOf(descriptor) {
		const {digest} = descriptor
		const known = this.#found.get(digest)
		if (known) {
			this.#count(sumOf(known, ({parts}) => parts.length))
			return known
		}
		const images = []
		const seen = /* @__PURE__ */ new Set()
		const blobsBefore = this.#namedBlobs
		this.#found.set(digest, images)
		if (!this.#documents.file(blobPath(digest))) this.problems.push({kind: "missing", entry: blobPath(digest)})
		else this.#collect(descriptor, 0, seen, images)
		images.sort((left, right) => Number(isUnknown(left)) - Number(isUnknown(right)))
		const isRead = this.#documents.manifest(descriptor) !== void 0
		const isEmpty = isRead && images.length === 0 && this.#namedBlobs === blobsBefore
		if (isEmpty) this.problems.push({kind: "nothing-here", entry: blobPath(digest)})
		return images
	}
	#collect(descriptor, depth, seen, images) {
		const {digest, platform} = descriptor
		const entry = blobPath(digest)
		if (seen.has(digest) || !this.#count(1)) return
		seen.add(digest)
		if (depth > LIMITS.indexDepth) {
			const reason = `indexes inside indexes, more than ${LIMITS.indexDepth} deep`
			this.problems.push({kind: "malformed", entry, reason})
			return
		}
		const manifest = this.#documents.manifest(descriptor)
		if (manifest?.kind === "image") {
			const image = this.#describe(manifest, platform)
			if (image) images.push({digest, ...image})
		}
		if (manifest?.kind !== "index") return
		for (const child of manifest.manifests) {
			const isThere = this.#documents.file(blobPath(child.digest)) !== void 0
			if (!isThere) continue
			if (isManifestType(child)) this.#collect(child, depth + 1, seen, images)
			else this.#addBlob(child)
		}
	}
	#addBlob(child) {
		this.#namedBlobs += 1
		this.#blobs.set(child.digest, partOf(child))
	}
	#describe(manifest, stated) {
		const {config, layers} = manifest
		if (!this.#count(layers.length + 1)) return void 0
		const hasImageConfig = CONFIG_TYPES.includes(config.mediaType)
		const words = hasImageConfig ? this.#documents.config(blobPath(config.digest)) : void 0
		for (const {digest, mediaType} of layers)
			if (mediaType.endsWith("+encrypted")) this.#documents.markEncrypted(blobPath(digest))
		const platform = words ? words.platform : formatPlatform(stated)
		return {
			platform,
			config: words,
			isImage: isImage(manifest, words),
			hasDiffIds: needsDiffIds(words, claimsImage(manifest), layers.length),
			parts: [config, ...layers].map(partOf)
		}
	}
	#readDockerList() {
		const json = this.#documents.plainJson("manifest.json") ?? []
		const images = []
		for (const value of Array.isArray(json) ? json : [json]) {
			const entry = parseDockerEntry(value)
			if (!entry) {
				const reason = "is not as docker save makes it"
				this.problems.push({kind: "document", entry: "manifest.json", reason})
				break
			}
			if (!this.#count(entry.layers.length + 1)) break
			const parts = [entry.config, ...entry.layers].map(name => {
				const file = this.#documents.layer(name)
				return {entry: name, size: file ? lengthOfEntry(file.entry) : 0, mediaType: ""}
			})
			const config = this.#documents.config(entry.config)
			const layerCount = entry.layers.length
			const platform = config?.platform ?? ""
			images.push({
				name: printable(entry.tags.join(" ")),
				tags: entry.tags,
				digest: "",
				platform,
				config,
				isImage: config !== void 0 && hasOneDiffIdEach(config, layerCount),
				hasDiffIds: needsDiffIds(config, true, layerCount),
				parts
			})
		}
		return images
	}
	#checkLayout(hasIndex, hasList) {
		const layout = this.#documents.json("oci-layout")
		const isRight = hasIndex && isRecord(layout) && layout.imageLayoutVersion === "1.0.0"
		if (layout !== void 0 && !isRight && (hasIndex || hasList)) {
			const reason = "is there, but not of version 1.0.0 and with an index.json"
			this.problems.push({kind: "document", entry: "oci-layout", reason})
		}
		return isRight
	}
	#count(references) {
		const isFirst = this.#references <= LIMITS.tarReferences
		this.#references += references
		if (this.#references <= LIMITS.tarReferences) return true
		if (isFirst) this.problems.push({kind: "too-many-references"})
		return false
	}
}
var isCosignProof = ({kind}) => COSIGN_TAGS.some(tag => tag.kind !== void 0 && tag.kind === kind)
var isUnknown = ({platform}) => platform.startsWith("unknown")
var partOf = ({digest, size, mediaType}) => ({
	entry: blobPath(digest),
	size,
	mediaType
})
function needsDiffIds(config, isClaimed, layerCount) {
	if (!config) return false
	if (config.diffIds !== void 0) return true
	return isClaimed && layerCount > 0 && config.platform !== "" && !isUnknown(config)
}
var PartCheck = class {
	problems = []
	notUnpacked = /* @__PURE__ */ new Map()
	unpackedLayers = 0
	layersOfBase = /* @__PURE__ */ new Set()
	#documents
	#compared = /* @__PURE__ */ new Set()
	constructor(documents) {
		this.#documents = documents
	}
	checkImage({parts, config, hasDiffIds}) {
		const layerCount = parts.length - 1
		const hasRightIds = config !== void 0 && hasOneDiffIdEach(config, layerCount)
		if (hasDiffIds && !hasRightIds) this.problems.push({kind: "diff-ids", entry: parts[0]?.entry ?? ""})
		for (const [at, part] of parts.entries()) {
			const seen = this.checkPart(part, at > 0)
			const diffId = at > 0 && hasRightIds ? String(config.diffIds?.[at - 1]) : void 0
			if (seen && diffId) this.#compare(seen, part, diffId)
		}
	}
	checkPart({entry, size}, isLayer = false) {
		const own = this.#documents.file(entry)
		const seen = own ?? (isLayer ? this.#documents.layer(entry) : void 0)
		if (seen && !own) this.layersOfBase.add(resolveName(entry))
		if (!seen) {
			this.problems.push({kind: "missing", entry})
			return void 0
		}
		const actualBytes = lengthOfEntry(seen.entry)
		if (actualBytes === size) return seen
		this.problems.push({kind: "size", entry, expectedBytes: size, actualBytes})
		return void 0
	}
	#compare(seen, {entry}, diffId) {
		const name = seen.entry.name
		const key = `${name} ${diffId}`
		if (!seen.isIntact || !seen.unpacked || this.#compared.has(key)) return
		this.#compared.add(key)
		const {outcome, packing, digests, hasRest} = seen.unpacked
		const isSame = digests.includes(diffId)
		const isOtherAlgorithm = !digests.some(each => algorithmOf(each) === algorithmOf(diffId))
		const isPartial = packing === "zstd" && outcome === "whole" && hasRest
		if (outcome === "endless") return
		if (this.#documents.isEncrypted(entry)) this.#skip("encrypted")
		else if (outcome === "whole" && isSame) this.unpackedLayers += 1
		else if (outcome === "not-unpacked" || isPartial) this.#skip(packing ?? "unknown")
		else if (isOtherAlgorithm) this.#skip(algorithmOf(diffId))
		else this.problems.push({kind: "diff-id", entry: name, diffId})
	}
	#skip(reason) {
		this.notUnpacked.set(reason, (this.notUnpacked.get(reason) ?? 0) + 1)
	}
}
var MOST_DOCKER_LAYERS = 125
var UNPACKS = {
	gzip: ["docker", "podman", "skopeo oci-archive"],
	zstd: ["podman", "skopeo docker-archive", "skopeo oci-archive"]
}
var LoaderJudge = class {
	#held
	#documents
	#isRooted
	constructor(held, documents) {
		this.#held = held
		this.#documents = documents
		this.#isRooted = [...documents.entries()].some(({isRooted}) => isRooted)
	}
	run() {
		const {entries, listed} = this.#held
		const ofArchive = this.#faultsOfArchive()
		const ofLayout = this.#faultsOfLayout()
		if (this.#documents.form.isFolder)
			return [
				this.#verdict("podman", this.#faultsOfPodmanFolder(), {zstdSince: 4}),
				this.#verdict("skopeo oci", ofLayout, {needsName: entries.length > 1})
			]
		const isForPodman = this.#faultsOfPodmanArchive().length === 0 || this.#faultsOfPodmanLayout().length === 0
		const ofPodman = listed.length > 0 ? this.#faultsOfPodmanArchive() : this.#faultsOfPodmanLayout()
		return [
			this.#verdict("docker", this.#faultsOfDocker(), {zstdSince: 23}),
			this.#verdict("podman", isForPodman ? [] : ofPodman, {zstdSince: 4}),
			this.#verdict("ctr", this.#faultsOfContainerd()),
			this.#verdict("skopeo docker-archive", ofArchive, {needsName: listed.length > 1}),
			this.#verdict("skopeo oci-archive", ofLayout, {needsName: entries.length > 1})
		]
	}
	#verdict(program, faults, {zstdSince, needsName} = {}) {
		const reasons = [...faults, ...this.#faultsOfPacking(program)]
		const takes = reasons.length === 0
		const sinceVersion = takes && this.#hasZstd() ? zstdSince : void 0
		return {
			program,
			takes,
			...(sinceVersion !== void 0 && {sinceVersion}),
			...(needsName !== void 0 && {needsName}),
			reasons
		}
	}
	#faultsOfPacking(program) {
		const {packing, isOddlyPacked} = this.#documents.form
		if (packing === void 0) return []
		const isUnpacked = UNPACKS[packing]?.includes(program) === true && !isOddlyPacked
		return isUnpacked ? [] : [{kind: "compressed"}]
	}
	#hasZstd() {
		const {indexed, listed} = this.#held
		const layers = [...indexed, ...listed].flatMap(({parts}) => parts.slice(1))
		return layers.some(part => part.mediaType.includes("zstd") || this.#unpacked(part)?.packing === "zstd")
	}
	#unpacked({entry}) {
		return this.#documents.layer(entry)?.unpacked
	}
	#faultsOfDocker() {
		const {listed} = this.#held
		if (listed.length === 0) return [{kind: "no-manifest-json"}]
		const faults = listed.flatMap(image => this.#faultsOfImage(image))
		for (const {platform, parts} of listed) {
			const entry = parts[0]?.entry ?? ""
			if (platform.startsWith("windows")) faults.push({kind: "windows", entry})
			if (parts.length - 1 > MOST_DOCKER_LAYERS) faults.push({kind: "too-many-layers", entry})
		}
		const ofUnpacking = faultsOfUnpacking(this.#documents.entries())
		return [...faults, ...this.#faultsOfTags(), ...this.#faultsOfBase(), ...ofUnpacking]
	}
	#faultsOfBase() {
		return this.#held.listed.flatMap(({parts}) => {
			const layers = parts.slice(1).map(({entry}) => entry)
			const last = layers.findLastIndex(layer => this.#documents.file(layer) === void 0)
			const isThere = last < 0 || this.#documents.base?.hasChain(layers.slice(0, last + 1))
			return isThere ? [] : [{kind: "not-at-bottom", entry: layers[last] ?? ""}]
		})
	}
	#faultsOfTags() {
		const isRight = this.#held.listed.every(({tags}) => tags.every(isTaggedName))
		return isRight ? [] : [{kind: "bad-name", entry: "manifest.json"}]
	}
	#faultsOfPodmanArchive() {
		const {listed} = this.#held
		if (listed.length === 0) return [{kind: "no-manifest-json"}]
		if (this.#documents.form.packing === "gzip") return [{kind: "compressed"}]
		const faults = listed.flatMap(image => this.#faultsOfImage(image))
		const ofLinks = this.#faultsOfLinks(listed.flatMap(namesOfParts), "1")
		return [...faults, ...this.#faultsOfTags(), ...ofLinks, ...this.#faultsOfNames()]
	}
	#faultsOfPodmanFolder() {
		const entry = path.resolve(this.#documents.form.where)
		const isName = isReference(`localhost${entry}:latest`)
		return [...this.#faultsOfPodmanLayout(), ...(isName ? [] : [{kind: "folder-name", entry}])]
	}
	#faultsOfPodmanLayout() {
		const {entries, isLayout} = this.#held
		const [entry] = entries
		if (!isLayout || !entry) return [{kind: "no-layout"}]
		if (entries.length > 1) return [{kind: "several"}]
		const images = entry.images.filter(image => !isUnknown(image))
		const ofImages = images.flatMap(image => this.#faultsOfImage(image))
		return [...faultsOfTree(entry), ...ofImages, ...this.#faultsOfUnpackingLayout()]
	}
	#faultsOfContainerd() {
		const {entries, listed, isLayout} = this.#held
		if (!isLayout && listed.length === 0) return [{kind: "no-layout"}]
		const named = entries.filter(({name, isCompanion}) => name !== "" && !isCompanion)
		const tagged = listed.filter(({tags}) => tags.length > 0)
		if ((isLayout ? named : tagged).length === 0) return [{kind: "no-name"}]
		const images = isLayout ? named.flatMap(({images: images2}) => images2) : tagged
		const unpacked = images.filter(image => !isUnknown(image))
		const faults = unpacked.flatMap(image => this.#faultsOfImage(image)).filter(({kind}) => kind !== "path-twice")
		const parts = unpacked.flatMap(image => image.parts.slice(1))
		faults.push(...parts.flatMap(part => this.#faultsOfLabel(part)))
		const names = images.flatMap(namesOfParts)
		const ofList = isLayout ? faultsOfSameName(named) : this.#faultsOfTags()
		const ofLinks = isLayout
			? this.#faultsOfLinks([...DOCUMENT_NAMES, ...names], "12")
			: this.#faultsOfLinks(names, "1")
		return [...faults, ...ofList, ...ofLinks, ...this.#faultsOfNames()]
	}
	#faultsOfLinks(names, types) {
		const links = [...new Set(names)].filter(name => {
			const type = this.#documents.typeOf(name)
			return type !== void 0 && types.includes(type)
		})
		return links.map(entry => ({kind: "link", entry}))
	}
	#faultsOfArchive() {
		const {listed} = this.#held
		if (listed.length === 0) return [{kind: "no-manifest-json"}]
		const isNameless = listed.length > 1 && listed.some(({tags}) => tags.length === 0)
		const faults = isNameless ? [{kind: "no-name"}] : []
		for (const image of listed) {
			const ofImage = this.#faultsOfImage(image)
			faults.push(...ofImage.filter(({kind}) => !OF_UNPACKING.includes(kind)))
		}
		const names = ["manifest.json", ...listed.flatMap(namesOfParts)]
		return [...faults, ...this.#faultsOfLinks(names, "1"), ...this.#faultsOfNames()]
	}
	#faultsOfLayout() {
		const {entries, isLayout} = this.#held
		if (!isLayout) return [{kind: "no-layout"}]
		const ofUnpacking = this.#faultsOfUnpackingLayout()
		if (entries.length === 1) return [...entries.flatMap(faultsOfTree), ...ofUnpacking]
		const ofEntries = entries
			.filter(({isCompanion}) => !isCompanion)
			.flatMap(entry => {
				const isOci = [OCI_MANIFEST, OCI_INDEX].includes(entry.descriptor.mediaType)
				const isFound = entry.refName !== "" && isOci
				return isFound ? faultsOfTree(entry) : [{kind: "no-name"}]
			})
		return [...ofEntries, ...ofUnpacking]
	}
	#faultsOfUnpackingLayout() {
		const links = [...this.#documents.entries()].filter(
			({type, name, linkName}) => type === "2" && path.posix.join(path.posix.dirname(name), linkName).startsWith("..")
		)
		return [
			...links.map(({name: entry}) => ({kind: "odd-link", entry})),
			...faultsOfUnpacking(this.#documents.entries())
		]
	}
	#faultsOfNames() {
		return this.#isRooted ? [{kind: "rooted-names"}] : []
	}
	#faultsOfImage(image) {
		if (!image.isImage) return [{kind: "no-image", entry: image.parts[0]?.entry ?? ""}]
		return image.parts.slice(1).flatMap(part => this.#faultsOfLayer(part))
	}
	#faultsOfLayer(part) {
		const {entry} = part
		if (this.#documents.isEncrypted(entry)) return [{kind: "encrypted", entry}]
		const unpacked = this.#unpacked(part)
		const isUnknown2 = unpacked?.outcome === "not-unpacked" && unpacked.packing !== "zstd"
		if (isUnknown2) return [{kind: "packing", entry}]
		if (!unpacked || unpacked.outcome === "not-unpacked") return []
		const hasRest = unpacked.packing === "gzip" && unpacked.hasRest
		if (hasRest) return [{kind: "trailing-bytes", entry}]
		const isPartial = unpacked.packing === "zstd" && unpacked.hasRest
		if (!unpacked.isTar && !isPartial) return [{kind: "no-tar", entry}]
		return unpacked.odd ? [{entry, ...unpacked.odd}] : []
	}
	#faultsOfLabel(part) {
		const {entry, mediaType} = part
		const packing = this.#unpacked(part)?.packing
		const isPlainType = /^application\/vnd\.oci\.image\.layer\..*\.tar$/.test(mediaType)
		return isPlainType && packing ? [{kind: "label", entry}] : []
	}
}
var OF_UNPACKING = ["no-tar", "path-twice", "odd-path"]
var namesOfParts = ({parts}) => parts.map(({entry}) => entry)
function faultsOfTree({descriptor, platforms}) {
	if (!platforms) return []
	const entry = blobPath(descriptor.digest)
	if (platforms.depth > 1) return [{kind: "nested-index", entry}]
	return platforms.here < platforms.named ? [{kind: "partial-index", entry}] : []
}
function faultsOfUnpacking(entries) {
	const faults = []
	const files = /* @__PURE__ */ new Set()
	for (const header of entries) {
		const {name: entry, type, linkName} = header
		const isRight = UNPACKED_TYPES.includes(type) && isUnpackable(header)
		if (!isRight) faults.push({kind: "odd-entry", entry})
		const isDangling = type === "1" && !files.has(resolveName(linkName))
		if (isDangling) faults.push({kind: "odd-link", entry})
		if (type !== "5") files.add(entry)
	}
	return faults
}
function faultsOfSameName(entries) {
	const digests = /* @__PURE__ */ new Map()
	for (const {name, descriptor} of entries) {
		const before = digests.get(name) ?? descriptor.digest
		if (before !== descriptor.digest) return [{kind: "same-name", entry: "index.json"}]
		digests.set(name, before)
	}
	return []
}
var isTaggedName = text => /^[^@]*:[^:/@]+(@|$)/.test(text) && isReference(text)
function manifestsIn(documents, {entries}) {
	const held = /* @__PURE__ */ new Map()
	const collect = (descriptor, depth) => {
		const {digest} = descriptor
		const manifest = held.has(digest) ? void 0 : documents.manifest(descriptor)
		if (!manifest || depth > LIMITS.indexDepth) return
		held.set(digest, {digest, manifest})
		if (manifest.kind === "index") for (const child of manifest.manifests) collect(child, depth + 1)
	}
	for (const {descriptor} of entries) collect(descriptor, 0)
	return [...held.values()]
}
function vouchedFor(manifests, testimonies) {
	const vouched = /* @__PURE__ */ new Set()
	const add = digest => {
		if (vouched.has(digest)) return
		vouched.add(digest)
		const manifest = manifests.find(held => held.digest === digest)?.manifest
		if (manifest?.kind === "index") for (const child of manifest.manifests) add(child.digest)
	}
	for (const testimony of testimonies) if (typeof testimony === "object") testimony.subjects.forEach(add)
	return vouched
}
function requireSignatures(where, documents, held, signers) {
	const manifests = manifestsIn(documents, held)
	const images = manifests.flatMap(({digest, manifest}) => (manifest.kind === "image" ? [{digest, manifest}] : []))
	const layers = images.flatMap(({manifest}) => manifest.layers.filter(isSignature))
	checkSignatureCount(layers, where)
	const testimonies = layers.map(layer => {
		const bytes = documents.bytes(layer.digest)
		return bytes ? readSignature(layer, bytes, signers) : "unreadable"
	})
	const vouched = vouchedFor(manifests, testimonies)
	const verdicts = digest => testimonies.map(each => judge(each, [digest]))
	for (const {descriptor, name, isCompanion} of held.entries) {
		const {digest} = descriptor
		const shown = `${where}: ${name.replace(/@.*/, "")}@${digest}`
		const isLoaded = !isCompanion || held.entries.length === 1
		if (isLoaded && !vouched.has(digest)) refuseUnsigned(shown, verdicts(digest), signers)
	}
	const signedConfigs = images.filter(({digest}) => vouched.has(digest)).map(({manifest}) => manifest.config.digest)
	for (const {name, parts} of held.listed) {
		const config = documents.file(parts[0]?.entry ?? "")?.entry.name ?? ""
		const isSigned = signedConfigs.includes(digestInName(config) ?? "")
		if (!isSigned) refuseUnsigned(`${where}: ${name} of manifest.json`, verdicts(""), signers)
	}
}
async function lookThrough(source, withContent, options) {
	const look = () =>
		stoppable(options.signal, async (signal, callbacks) => {
			const opened = await openTarSource(source, signal)
			const onProgress = callbacks.guard(options.onProgress)
			try {
				return await new Look(opened, {...options, signal, onProgress}).run(withContent)
			} finally {
				await opened.close()
			}
		})
	return onDisk(`cannot read ${nameOfSource(source)}`, look())
}
var LOOK_OPTION_KINDS = {
	signal: "an AbortSignal",
	onProgress: "a function"
}
var VERIFY_OPTION_KINDS = {
	...LOOK_OPTION_KINDS,
	signedBy: "a list of strings",
	since: "a string"
}
function checkLook(source, options, kinds = LOOK_OPTION_KINDS) {
	checkKinds(options, kinds)
	const isPath = typeof source === "string" && !hasNul(source)
	const isSource = isPath || Symbol.asyncIterator in Object(source)
	if (!isSource) fail("BAD_OPTION", "a tar is the path of a file or folder, or a stream of bytes")
}
async function listTar(source, options = {}) {
	checkLook(source, options)
	const contents = await lookThrough(source, false, options)
	refuseProblems(
		contents.where,
		contents.problems.filter(({kind}) => kind !== "cut-off")
	)
	const documents = new TarDocuments(contents)
	const finder = new ImageFinder(documents)
	const held = finder.run()
	refuseProblems(contents.where, [...documents.problems, ...finder.problems])
	return imagesOf(held).map(image => describeImage(image, documents))
}
async function verifyTar(source, options = {}) {
	checkLook(source, options, VERIFY_OPTION_KINDS)
	const signers = await readSigners(options.signedBy)
	const report = await inspectTar(source, options, signers)
	refuseProblems(nameOfSource(source), report.problems, report)
	return report
}
async function inspectTar(source, options, signers) {
	const base = options.since === void 0 ? void 0 : await readBase(options.since, options)
	const contents = await lookThrough(source, true, options)
	const files = [...contents.files.values()]
	const problems = [...files.flatMap(problemsOfFile), ...contents.problems]
	const blobCount = files.filter(({entry}) => digestInName(entry.name)).length
	const isReadable2 = contents.problems.every(({kind}) => kind === "cut-off")
	if (!isReadable2)
		return {
			images: [],
			blobs: blobCount,
			unpackedLayers: 0,
			baseLayers: 0,
			notUnpacked: [],
			platforms: {here: 0, named: 0},
			absentManifests: 0,
			loaders: [],
			problems
		}
	const documents = new TarDocuments(contents, base)
	const finder = new ImageFinder(documents)
	const held = finder.run()
	const images = imagesOf(held)
	const named = [...held.indexed, ...held.listed, ...held.companions]
	const check = new PartCheck(documents)
	for (const image of named) check.checkImage(image)
	for (const blob of held.blobs) check.checkPart(blob)
	problems.push(...documents.problems, ...finder.problems, ...check.problems)
	const isWhole = problems.length === 0
	if (isWhole && signers.length > 0) requireSignatures(nameOfSource(source), documents, held, signers)
	return {
		images: images.map(image => describeImage(image, documents)),
		blobs: blobCount,
		unpackedLayers: check.unpackedLayers,
		baseLayers: check.layersOfBase.size,
		notUnpacked: [...check.notUnpacked].map(([reason, layers]) => ({reason, layers})),
		platforms: {
			here: sumOf(held.indexes, ({here}) => here),
			named: sumOf(held.indexes, ({named: named2}) => named2)
		},
		absentManifests: sumOf(held.indexes, ({absentManifests}) => absentManifests),
		loaders: new LoaderJudge(held, documents).run(),
		problems: uniqueProblems(problems)
	}
}
async function readBase(file, {signal}) {
	const contents = await lookThrough(file, true, {signal})
	const files = [...contents.files.values()]
	refuseProblems(file, [...files.flatMap(problemsOfFile), ...contents.problems])
	return new BaseTar(contents)
}
function problemsOfFile({entry, isIntact: isIntact2, unpacked}) {
	const isEndless2 = unpacked?.outcome === "endless"
	if (isEndless2) return [{kind: "unpacks-without-end", entry: entry.name}]
	return isIntact2 ? [] : [{kind: "damaged", entry: entry.name}]
}
var imagesOf = ({indexed, listed}) => (indexed.length > 0 ? indexed : listed)
function describeImage(image, documents) {
	const layers = image.parts.slice(1).map(({entry, size}) => ({
		digest: digestInName(entry) ?? printable(entry),
		size,
		present: documents.layer(entry) !== void 0
	}))
	const {name, digest, platform, isImage: isImage2} = image
	const {here = 0, named = 0} = image.platforms ?? {}
	const platforms = here < named ? {here, named} : void 0
	const sizeBytes = sumOf(layers, ({size}) => size)
	return {name, digest, platform, isImage: isImage2, sizeBytes, layers, ...dropEmpty({platforms})}
}
function uniqueProblems(problems) {
	return [...new Map(problems.map(problem => [JSON.stringify(problem), problem])).values()]
}
function refuseProblems(where, problems, report) {
	const unique = uniqueProblems(problems)
	const lines = unique
		.slice(0, LIMITS.problemLines)
		.map(problem => `${where}: ${printable(problemWords(problem), 1e3)}`)
	if (unique.length > lines.length) lines.push(`${where}: and ${unique.length - lines.length} more things are wrong`)
	if (lines.length > 0 && where.endsWith(".partial"))
		lines.push(`${where}: it is what a pull keeps until it is whole: the same command goes on with it`)
	if (lines.length > 0) fail("BAD_TAR", lines.join("\n"), {report})
}
var TarReader = class {
	#opened
	#isBegun = false
	constructor(opened) {
		this.#opened = opened
	}
	async *files() {
		const {isSeekable, where} = this.#opened
		if (this.#isBegun && !isSeekable)
			fail("UNSUPPORTED", `${where}: a stream, or a compressed tar, can be gone through once`)
		this.#isBegun = true
		for await (const {entry, content} of this.#opened.members()) {
			if (!"0S".includes(entry.type)) continue
			const digest = digestInName(entry.name)
			yield {
				name: entry.name,
				sizeBytes: lengthOfEntry(entry),
				...(digest !== void 0 && {digest}),
				content
			}
		}
	}
	async *blob(digest) {
		for await (const file of this.files()) {
			if (file.digest !== digest) continue
			const hash = newHash(digest)
			for await (const piece of file.content()) {
				hash.update(piece)
				yield piece
			}
			if (hash.digest("hex") !== hexOf(digest))
				fail("DIGEST_MISMATCH", `${this.#opened.where}: ${file.name} has another digest`)
			return
		}
		fail("NOT_FOUND", `${this.#opened.where} does not hold ${printable(digest)}`)
	}
	close() {
		return this.#opened.close()
	}
}
async function openTar(source, options = {}) {
	checkLook(source, options)
	const where = nameOfSource(source)
	return new TarReader(await onDisk(`cannot read ${where}`, openTarSource(source, options.signal)))
}
var PULL_OPTIONS = {
	os: {
		short: "o",
		value: "OS",
		help: "operating system wanted; default: this machine's",
		option: "osType",
		tasks: ["pull", "manifest"]
	},
	arch: {
		short: "a",
		value: "ARCH",
		help: "processor wanted (amd64, arm64, arm ...)",
		option: "archType",
		tasks: ["pull", "manifest"]
	},
	variant: {
		value: "V",
		help: "processor variant wanted (v7, v8 ...)",
		option: "variant",
		tasks: ["pull", "manifest"]
	},
	platform: {
		value: "OS/ARCH[/V]",
		help: "the three in one word; several with commas; or all",
		option: "platforms",
		convert: typed => (typed === "all" ? typed : typed.split(",")),
		tasks: ["pull", "manifest"]
	},
	from: {value: "FILE", help: "read more IMAGEs: lines, YAML, JSON; - is stdin"},
	name: {value: "NAME", help: "the name that the image gets in the tar", option: "name"},
	rename: {
		value: "FROM=TO",
		help: "in the tar, names in FROM are in TO (repeatable)",
		isRepeatable: true,
		option: "renames",
		convert: typed => parsePairs("rename", typed)
	},
	reuse: {
		value: "TAR",
		help: "take blobs from a tar that exists (repeatable)",
		isRepeatable: true,
		option: "reuse"
	},
	since: {
		value: "TAR",
		help: "leave out layers TAR holds; of --verify: its base",
		option: "since",
		tasks: ["pull", "verify"]
	},
	referrers: {help: "bring signatures, attestations and SBOMs along", option: "referrers"},
	"signed-by": {
		value: "KEY",
		help: "only what this PEM key signed (repeatable)",
		isRepeatable: true,
		option: "signedBy",
		tasks: ["pull", "manifest", "verify"]
	},
	"dry-run": {help: "say what would be pulled, write nothing", option: "dryRun"}
}
var REGISTRY_OPTIONS = {
	ns: {
		short: "n",
		value: "HOST",
		help: "the registry that a mirror stands for (?ns=)",
		option: "namespace"
	},
	mirror: {
		value: "HOST=PLACE",
		help: "ask PLACE first for images of HOST (repeatable)",
		isRepeatable: true,
		option: "mirrors",
		convert: typed => parseLists("mirror", typed)
	},
	scheme: {short: "s", value: "https|http", help: "default https", option: "scheme"},
	user: {
		short: "u",
		value: "NAME",
		help: "user name for basic authentication",
		option: "username"
	},
	password: {
		short: "p",
		value: "WORD",
		help: "its password",
		isSecret: true,
		option: "password"
	},
	"password-stdin": {help: "read the password from stdin"},
	token: {
		short: "t",
		value: "TOKEN",
		help: "sent as Basic TOKEN",
		isSecret: true,
		option: "token"
	},
	cert: {short: "c", value: "FILE", help: "client certificate (PEM)", option: "tlsCert"},
	key: {short: "k", value: "FILE", help: "its key (PEM)", option: "tlsKey"},
	cacert: {
		short: "x",
		value: "FILE",
		help: "trust this CA as well (PEM); alias --ca",
		alias: "ca",
		option: "caCert"
	},
	insecure: {short: "i", help: "do not verify the server's certificate", option: "insecure"},
	concurrency: {
		short: "j",
		value: "N",
		help: "connections used at once, 1 to 64; default 16",
		option: "concurrency",
		convert: typed => parseNumber("concurrency", typed)
	},
	retries: {
		value: "N",
		help: "attempts after the first; default 5",
		option: "retries",
		convert: typed => parseNumber("retries", typed)
	},
	timeout: {
		value: "SECONDS",
		help: "how long a connection may be silent; default 30",
		option: "timeoutMs",
		convert: typed => Math.ceil(parseNumber("timeout", typed) * 1e3)
	}
}
var LOOK_OPTIONS = {
	manifest: {short: "m", value: "list|image", help: "print the manifest", tasks: ["manifest"]},
	"list-tar": {
		short: "l",
		value: "TAR",
		help: "say what a tar holds, offline",
		tasks: ["list-tar"]
	},
	verify: {value: "TAR", help: "hash a tar again, offline", tasks: ["verify"]},
	parsed: {help: "print the parsed command line as JSON"},
	quiet: {short: "q", help: "no progress"},
	version: {short: "v", help: "print the version"},
	help: {short: "h", help: "print this help"}
}
var OPTION_TABLE = {...PULL_OPTIONS, ...REGISTRY_OPTIONS, ...LOOK_OPTIONS}
var OPTION_GROUPS = [
	{title: "What to pull", options: PULL_OPTIONS, tasks: ["pull"]},
	{title: "Registry", options: REGISTRY_OPTIONS, tasks: ["pull", "manifest"]},
	{
		title: "Look, do not pull",
		options: LOOK_OPTIONS,
		tasks: ["pull", "manifest", "list-tar", "verify"]
	}
]
var OPTIONS = OPTION_GROUPS.flatMap(({options, tasks}) =>
	Object.entries(options).map(([name, spec]) => ({name, tasks, ...spec}))
)
var usage = reason => fail("BAD_OPTION", `${reason} (imgpull --help)`)
function parseNumber(option, typed) {
	if (!/^\d+(\.\d+)?$/.test(typed)) usage(`--${option} is a number, not "${printable(typed)}"`)
	return Number(typed)
}
function parsePairs(option, typed) {
	const pairs = /* @__PURE__ */ new Map()
	for (const text of typed) {
		const [from = "", to = "", ...more] = text.split("=")
		if (from === "" || to === "" || more.length > 0) usage(`--${option} is FROM=TO, not "${printable(text)}"`)
		if (pairs.has(from)) usage(`--${option} ${printable(from)} is given twice`)
		pairs.set(from, to)
	}
	return Object.fromEntries(pairs)
}
function parseLists(option, typed) {
	const lists = /* @__PURE__ */ new Map()
	for (const text of typed) {
		const [, host = "", place = ""] = /^([^=]+)=(.+)$/.exec(text) ?? []
		if (host === "") usage(`--${option} is HOST=PLACE, not "${printable(text.replace(/^.*@/, "***@"))}"`)
		lists.set(host, [...(lists.get(host) ?? []), place])
	}
	return Object.fromEntries(lists)
}
var FAULT_WORDS = {
	"bad-name": "has a name that is none, or that has no tag",
	"folder-name": "is a path that no image can be called after",
	compressed: "the tar is compressed as a whole",
	"rooted-names": "names begin with a slash",
	link: "is a link",
	"odd-entry": "is of a type, or has a name, that is not unpacked",
	"odd-link": "is a link that leads nowhere",
	windows: "is for Windows",
	"too-many-layers": `has more than ${MOST_DOCKER_LAYERS} layers`,
	encrypted: "is encrypted",
	"no-tar": "is no tar",
	"path-twice": "makes one of its paths twice, or where nothing is",
	"odd-path": "has a path that cannot be unpacked",
	"trailing-bytes": "has bytes after what is compressed",
	label: "is compressed, and its type says that it is not",
	packing: "is compressed in a way that cannot be checked here",
	"not-at-bottom": "stands on other layers in the base",
	"same-name": "has one name for several images"
}
var internals = Object.freeze({
	BlobState,
	EarlyRoom,
	Schedule,
	LIMITS,
	OPTIONS,
	Secrets,
	TUNING,
	defaultDestination,
	encodeTarHeader,
	formatReference,
	imageName,
	isCacheMiss,
	isExemptFromProxy,
	judge,
	matchPlatform,
	openTarFile,
	parseChallenges,
	parseManifest,
	parsePublicKey,
	parseReference,
	planTar,
	proxyFor,
	readSignature,
	readTar,
	pulledImage,
	runPull,
	verifyTar,
	wantedPlatform,
	withSession
})
export {ImgpullError, Puller, listTar, newPullerOpts, openTar, parseImageList, parseReference, pullImages, verifyTar}
