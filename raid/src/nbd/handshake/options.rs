//! What an option is answered, once all of it has come.

use super::super::wire::{
    self, ALLOCATION_CONTEXT, ALLOCATION_ID, ClientOption, ExportQuery, MetaQuery, OptionError, OptionReply,
    Style, info, option,
};
use super::{Export, Handshake, Progress, Refused, Session, Tls};
use bytes::{BufMut, BytesMut};
use std::sync::Arc;

/// Block sizes that are advertised: any byte range, best in pages, and the most that one request may carry.
const BLOCK_SIZE: OptionReply =
    OptionReply::BlockSize { minimum: 1, preferred: 4096, maximum: wire::MAX_PAYLOAD };

impl Handshake {
    pub(super) fn answer(
        &mut self,
        number: u32,
        payload: &[u8],
        output: &mut BytesMut,
    ) -> Result<Progress, Refused> {
        // Whatever it says: a choice of contexts takes the place of the one before, even if it fails.
        if number == option::SET_META_CONTEXT {
            self.allocation = None;
        }
        let wanted = match ClientOption::decode(number, payload) {
            Ok(wanted) => wanted,
            // EXPORT_NAME cannot be answered with an error.
            Err(malformed) if number == option::EXPORT_NAME => return Err(malformed.into()),
            Err(malformed) => {
                let text = format!("the option is malformed: {malformed}");
                OptionReply::Error(OptionError::Invalid, text).encode(number, output);
                return Ok(Progress::More);
            }
        };
        let mut say = |reply: OptionReply| reply.encode(number, output);
        let refusal = |error, text: &str| OptionReply::Error(error, text.to_owned());
        match wanted {
            ClientOption::ExportName(_) if self.style == Style::Extended => {
                return Err(Refused::ExtendedHeaders);
            }
            ClientOption::ExportName(name) => {
                let export = self.exports.find(&name).ok_or(Refused::UnknownExport)?;
                let session = self.session(export);
                output.put_u64(export.device.size());
                output.put_u16(export.transmission_flags(session.style, session.allocation));
                if !self.no_zeroes {
                    output.put_bytes(0, 124);
                }
                return Ok(Progress::Chosen(session));
            }
            ClientOption::Abort => {
                say(OptionReply::Ack);
                return Ok(Progress::Goodbye);
            }
            ClientOption::List => {
                for (name, export) in self.exports.names() {
                    let (name, description) = (name.to_owned(), export.description.clone());
                    say(OptionReply::Server { name, description });
                }
                say(OptionReply::Ack);
            }
            ClientOption::StartTls => match self.tls {
                Tls::Off => say(refusal(OptionError::Policy, "this server is not set up for TLS")),
                Tls::Started => say(refusal(OptionError::Invalid, "this session is under TLS")),
                Tls::Offered | Tls::Required => {
                    say(OptionReply::Ack);
                    return Ok(Progress::StartTls);
                }
            },
            ClientOption::StructuredReply if self.style == Style::Extended => {
                let text = "extended headers were negotiated";
                say(refusal(OptionError::ExtendedHeadersRequired, text));
            }
            ClientOption::StructuredReply => {
                self.style = Style::Structured;
                say(OptionReply::Ack);
            }
            ClientOption::ExtendedHeaders => {
                self.style = Style::Extended;
                say(OptionReply::Ack);
            }
            ClientOption::Info(query) => {
                self.describe(number, &query, output);
            }
            ClientOption::Go(query) => {
                return Ok(self.describe(number, &query, output).map_or(Progress::More, Progress::Chosen));
            }
            ClientOption::ListMetaContext(query) => self.meta_context(number, &query, true, output),
            ClientOption::SetMetaContext(query) => self.meta_context(number, &query, false, output),
            // Unknown options were drained by their header.
            ClientOption::Unknown(_) => {}
        }
        Ok(Progress::More)
    }

    fn session(&self, export: &Arc<Export>) -> Session {
        let chosen = self.allocation.as_ref().is_some_and(|chosen| Arc::ptr_eq(chosen, export));
        Session { export: Arc::clone(export), style: self.style, allocation: chosen }
    }

    /// Answers `INFO` and `GO`; the session, if there is an export of that name.
    fn describe(&self, number: u32, query: &ExportQuery, output: &mut BytesMut) -> Option<Session> {
        let Some(export) = self.exports.find(&query.name) else {
            let text = "no export of that name".to_owned();
            OptionReply::Error(OptionError::UnknownExport, text).encode(number, output);
            return None;
        };
        let session = self.session(export);
        let flags = export.transmission_flags(session.style, session.allocation);
        let mut say = |reply: OptionReply| reply.encode(number, output);
        say(OptionReply::Export { size: export.device.size(), flags });
        // Told unasked: a client that does not know of sizes ignores them, others save a round trip.
        say(BLOCK_SIZE);
        // Each at most once, however often a client repeats itself.
        if query.information.contains(&info::NAME) {
            say(OptionReply::Name(export.name.clone()));
        }
        if query.information.contains(&info::DESCRIPTION) {
            say(OptionReply::Description(export.description.clone()));
        }
        say(OptionReply::Ack);
        Some(session)
    }

    /// Answers `LIST_META_CONTEXT` and `SET_META_CONTEXT`. Queries of namespaces that are not known choose nothing.
    fn meta_context(&mut self, number: u32, query: &MetaQuery, list: bool, output: &mut BytesMut) {
        let mut say = |reply: OptionReply| reply.encode(number, output);
        if !list && self.style == Style::Simple {
            let text = "structured replies come first".to_owned();
            return say(OptionReply::Error(OptionError::Invalid, text));
        }
        let Some(export) = self.exports.find(&query.name) else {
            let text = "no export of that name".to_owned();
            return say(OptionReply::Error(OptionError::UnknownExport, text));
        };
        if query.wants_allocation(list) {
            let id = if list { 0 } else { ALLOCATION_ID };
            say(OptionReply::MetaContext { id, name: ALLOCATION_CONTEXT.to_owned() });
            if !list {
                self.allocation = Some(Arc::clone(export));
            }
        }
        say(OptionReply::Ack);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{exports, haggle, opened, query, send};
    use super::*;

    #[test]
    fn export_name_is_answered_with_or_without_zeroes() {
        for (flags, length) in [(0, 18 + 10 + 124), (1, 18 + 10 + 124), (3, 18 + 10)] {
            let (mut input, mut output) = (opened(flags), BytesMut::new());
            send(&mut input, &ClientOption::ExportName(String::new()));
            let progress =
                Handshake::start(exports(), Tls::Off, &mut output).advance(&mut input, &mut output);
            assert!(matches!(progress, Ok(Progress::Chosen(_))));
            assert_eq!(output.len(), length);
            assert_eq!(output[18..26], (1u64 << 20).to_be_bytes());
        }
        let (mut input, mut output) = (opened(3), BytesMut::new());
        send(&mut input, &ClientOption::ExportName("other".into()));
        let progress = Handshake::start(exports(), Tls::Off, &mut output).advance(&mut input, &mut output);
        assert!(matches!(progress, Err(Refused::UnknownExport)));
    }

    fn contexts(name: &str, query: &str) -> MetaQuery {
        MetaQuery { name: name.into(), queries: vec![query.into()] }
    }

    fn chosen(progress: Result<Progress, Refused>) -> (Style, bool) {
        match progress {
            Ok(Progress::Chosen(session)) => (session.style, session.allocation),
            _ => panic!("no session"),
        }
    }

    #[test]
    fn styles_and_contexts_are_settled_and_settled_again() {
        use ClientOption as O;
        let set = |name: &str, query: &str| O::SetMetaContext(contexts(name, query));
        let go = || O::Go(ExportQuery { name: "vol".into(), information: Vec::new() });
        let invalid = OptionError::Invalid as u32;
        let (told, progress, _) = haggle(Tls::Off, &[set("vol", "base:allocation"), go()]);
        assert_eq!((told, chosen(progress)), (vec![invalid, 3, 3, 1], (Style::Simple, false)));
        let (told, progress, _) = haggle(Tls::Off, &[O::StructuredReply, set("", "base:allocation"), go()]);
        assert_eq!((told, chosen(progress)), (vec![1, 4, 1, 3, 3, 1], (Style::Structured, true)));
        // A later choice replaces an earlier one, also if it fails or chooses nothing.
        for (again, told) in [(set("vol", "base:"), 1), (set("none", ""), OptionError::UnknownExport as u32)]
        {
            let options = [O::StructuredReply, set("vol", "base:allocation"), again, go()];
            let (all, progress, _) = haggle(Tls::Off, &options);
            assert_eq!((all, chosen(progress)), (vec![1, 4, 1, told, 3, 3, 1], (Style::Structured, false)));
        }
        let (told, progress, _) =
            haggle(Tls::Off, &[O::ExtendedHeaders, O::StructuredReply, set("vol", "base:allocation"), go()]);
        let required = OptionError::ExtendedHeadersRequired as u32;
        assert_eq!((told, chosen(progress)), (vec![1, required, 4, 1, 3, 3, 1], (Style::Extended, true)));
        let (_, progress, _) = haggle(Tls::Off, &[O::ExtendedHeaders, O::ExportName("vol".into())]);
        assert!(matches!(progress, Err(Refused::ExtendedHeaders)));
        let list = |query| O::ListMetaContext(contexts("", query));
        let (told, _, _) = haggle(Tls::Off, &[list("base:"), list("x-other:"), list("base:allocation")]);
        assert_eq!(told, [4, 1, 1, 4, 1]);
    }

    #[test]
    fn before_tls_that_is_required_nothing_is_told() {
        use ClientOption as O;
        let required = OptionError::TlsRequired as u32;
        let asked = [
            O::List,
            O::Info(query("vol")),
            O::Go(query("vol")),
            O::Unknown(99),
            O::StructuredReply,
            O::ListMetaContext(contexts("vol", "base:")),
        ];
        let (told, progress, _) = haggle(Tls::Required, &asked);
        assert_eq!(told, [required; 6]);
        assert!(matches!(progress, Ok(Progress::More)));
        let (told, progress, _) = haggle(Tls::Required, &[O::ExportName("vol".into())]);
        assert!(told.is_empty() && matches!(progress, Err(Refused::TlsRequired)));
        let (told, progress, _) = haggle(Tls::Required, &[O::Abort]);
        assert!(told == [1] && matches!(progress, Ok(Progress::Goodbye)));
        let (told, _, _) = haggle(Tls::Off, &[O::StartTls]);
        assert_eq!(told, [OptionError::Policy as u32]);
    }

    #[test]
    fn with_tls_the_haggling_begins_anew() {
        use ClientOption as O;
        let go = ClientOption::Go(query("vol"));
        let before = [O::ExtendedHeaders, O::SetMetaContext(contexts("vol", "base:allocation")), O::StartTls];
        let (told, progress, mut handshake) = haggle(Tls::Offered, &before);
        assert!(told == [1, 4, 1, 1] && matches!(progress, Ok(Progress::StartTls)));
        handshake.secured();
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        send(&mut input, &O::StartTls);
        send(&mut input, &go);
        let progress = handshake.advance(&mut input, &mut output);
        assert_eq!(chosen(progress), (Style::Simple, false));
        // A second one is refused, and the session goes on.
        assert_eq!(output[12..16], (OptionError::Invalid as u32).to_be_bytes());
        // What was sent behind STARTTLS, before its answer, is nobody's.
        let (_, progress, _) = haggle(Tls::Required, &[O::StartTls, go]);
        assert!(matches!(progress, Err(Refused::PlainAfterStartTls(_))));
    }
}
