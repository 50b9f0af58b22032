//! What templates of real models rely on.

use super::*;

fn say(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned(), name: None }
}

fn render(source: &str, messages: &[Message]) -> Result<String, TemplateError> {
    let conversation =
        Conversation { messages, bos_token: Some("<s>"), eos_token: Some("</s>"), add_generation_prompt: true, now_s: 1_709_210_096 };
    Template::new(source)?.render(conversation)
}

#[test]
fn chatml_renders_as_in_transformers() {
    let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let text = render(source, &[say("user", "Hi <b>&</b>")]).unwrap();
    assert_eq!(text, "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi <b>&</b><|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn gemma_style_control_flow_works() {
    let source = "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}\n    {%- set loop_messages = messages[1:] -%}\n{%- else -%}\n    {%- set first_user_prefix = \"\" -%}\n    {%- set loop_messages = messages -%}\n{%- endif -%}\n{%- for message in loop_messages -%}\n    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n        {{ raise_exception(\"Conversation roles must alternate user/assistant/user/assistant/...\") }}\n    {%- endif -%}\n    {%- if (message['role'] == 'assistant') -%}\n        {%- set role = \"model\" -%}\n    {%- else -%}\n        {%- set role = message['role'] -%}\n    {%- endif -%}\n    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}\n    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n    {%- elif message['content'] is iterable -%}\n        {{ 'parts' }}\n    {%- endif -%}\n    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}\n{%- endif -%}\n";
    let text = render(source, &[say("system", "S"), say("user", " Hi ")]).unwrap();
    assert_eq!(text, "<s><start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\n");
    let error = render(source, &[say("user", "a"), say("user", "b")]).unwrap_err();
    assert_eq!(error.to_string(), "Conversation roles must alternate user/assistant/user/assistant/...");
}

#[test]
fn python_methods_namespaces_and_loop_controls_work() {
    let source = "{%- set ns = namespace(n=0) %}{%- for m in messages[::-1] %}{%- if m.content.startswith('stop') %}{% break %}{% endif %}{%- set ns.n = ns.n + 1 %}{{ m.content.strip().split('|')[-1].lstrip('x') }};{% endfor %}{{ ns.n }}{% if tools is not none %}!{% endif %}{{ custom_tools is defined }}";
    assert_eq!(render(source, &[say("user", "stop"), say("user", " a|xxb "), say("user", "c")]).unwrap(), "c;b;2False");
}

#[test]
fn json_is_written_as_python_writes_it() {
    let source = r#"{{ {"a": [1, 2.5, true, none], "b": "<é>"} | tojson }}{{ [{"k": []}] | tojson(indent=2) }}"#;
    assert_eq!(render(source, &[]).unwrap(), "{\"a\": [1, 2.5, true, null], \"b\": \"<é>\"}[\n  {\n    \"k\": []\n  }\n]");
}

#[test]
fn dates_are_those_of_the_moment_passed_in() {
    let source = "{{ strftime_now('%d %b %Y|%Y-%m-%d %H:%M:%S|%A, %B %e|%I %p %y %a %q %%') }}";
    assert_eq!(render(source, &[]).unwrap(), "29 Feb 2024|2024-02-29 12:34:56|Thursday, February 29|12 PM 24 Thu %q %");
    assert_eq!(strftime("%Y-%m-%d %A", 0), "1970-01-01 Thursday");
    assert_eq!(strftime("%Y-%m-%d %A", 951_868_799), "2000-02-29 Tuesday");
}

#[test]
fn greedy_templates_are_stopped() {
    let steps = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    let text = "{% for a in range(9999) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}";
    for source in [steps, text, "{{ 'x' * 1000000000 }}"] {
        let error = render(source, &[say("user", &"x".repeat(1 << 16))]).unwrap_err();
        assert_eq!(error.to_string(), "the chat template takes too many steps, or makes too much text");
    }
    assert!(matches!(render("{% if %}", &[]), Err(TemplateError::Parse(_))));
    assert!(matches!(render("{{ messages.x.y }}", &[]), Err(TemplateError::Refused(_))));
}

/// Each of these ended the process by an overflow of a thread's usual stack.
#[test]
fn deep_templates_overflow_no_stack() {
    let chain =
        |head: &str, link: &str, tail: &str| format!("{{{{ {head}{}{tail} }}}}", link.repeat((SOURCE_BYTES_MAX - 100) / link.len()));
    let nested = |more: &str| format!("{{% set ns=namespace(x=[]) %}}{{% for i in range(99999) %}}{{% set ns.x={more} %}}{{% endfor %}}");
    let sources = [
        chain("", "-", "1"),
        chain("", "not ", "1"),
        chain("1", "+1", ""),
        chain("a", ".a", ""),
        chain("a", "|e", ""),
        chain("", "[", ""),
        nested("[ns.x]"),
        nested("[ns.x]") + "{{ ns.x }}",
        nested("[ns.x]") + "{{ ns.x|tojson }}",
        nested("{'a': ns.x}") + "{{ ns.x|tojson }}",
    ];
    for source in sources {
        let shown: String = source.chars().take(60).collect();
        let rendered = on_deep_stack(move || render(&source, &[]).map(drop).map_err(drop)).unwrap();
        // Whether it is refused or not: the process lives, and the thread did not panic.
        assert!(rendered.blocking_recv().is_ok(), "{shown}");
    }
}

#[test]
fn format_pads_within_reason() {
    assert_eq!(render("{{ '{:>5}'.format('a') }}", &[]).unwrap(), "    a");
    assert!(render("{{ '{:2000000000}'.format(1) }}", &[]).unwrap_err().to_string().contains("over 4 digits"));
}
